// Sends RATE requests a second to URL until its input ends; then prints what became of each, as one line of JSON.
import http from "node:http";

const [url, rate] = [process.argv[2], Number(process.argv[3])];
const agent = new http.Agent({ keepAlive: true, maxSockets: 64 });
/** Of each lost request: when it was sent (ms since the epoch), and why it is called lost. */
const losses = [];
/** When the answers with 200 came, thinned to one in 50 ms: enough to say when a service was back. */
const answered = [];
/** Of each request, when it was sent and when it was over, one after the other. */
const spans = [];
let [sent, done, ended] = [0, 0, false];

function send() {
  sent += 1;
  const at = Date.now();
  let told = false;
  const tell = (reason) => {
    if (told) return;
    told = true;
    done += 1;
    const now = Date.now();
    spans.push(at, now);
    if (reason !== undefined) losses.push({ at, reason });
    else if (now - (answered.at(-1) ?? 0) >= 50) answered.push(now);
  };
  const request = http.get(url, { agent, timeout: 5000 }, (response) => {
    let body = "";
    response.setEncoding("utf8");
    response.on("data", (part) => {
      body += part;
    });
    response.on("end", () =>
      tell(
        response.statusCode === 200
          ? undefined
          : `status ${response.statusCode}: ${body.slice(0, 120).trim()}`,
      ),
    );
    response.on("error", (error) => tell(error.message));
  });
  request.on("timeout", () => request.destroy(new Error("no answer within 5 s")));
  request.on("error", (error) => tell(error.message));
}

process.stdin.resume();
process.stdin.on("end", () => {
  ended = true;
});
const started = performance.now();
const timer = setInterval(() => {
  const due = ended ? sent : Math.floor(((performance.now() - started) / 1000) * rate);
  while (sent < due) send();
  if (!ended || done < sent) return;
  clearInterval(timer);
  process.stdout.write(`${JSON.stringify({ sent, losses, answered, spans })}\n`, () => process.exit(0));
}, 5);
