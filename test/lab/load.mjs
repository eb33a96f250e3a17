// Sends RATE requests a second to URL for SECONDS and prints {sent, failed, failures}; runs in a machine, as an ordinary user.
import http from "node:http";

const [url, rate, seconds] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const agent = new http.Agent({ keepAlive: true, maxSockets: 64 });
let [sent, done, failed] = [0, 0, 0];
const failures = {};
const servers = {};

const count = (reason) => {
  done += 1;
  if (reason === undefined) return;
  failed += 1;
  failures[reason] = (failures[reason] ?? 0) + 1;
};

function send() {
  sent += 1;
  const request = http.get(url, { agent, timeout: 5000 }, (response) => {
    let body = "";
    response.setEncoding("utf8");
    response.on("data", (part) => {
      body += part;
    });
    response.on("end", () => {
      count(response.statusCode === 200 ? undefined : `status ${response.statusCode}: ${body.slice(0, 120)}`);
      const server = /"server": "([^"]+)"/.exec(body)?.[1] ?? "none";
      servers[server] = (servers[server] ?? 0) + 1;
    });
  });
  request.on("timeout", () => request.destroy(new Error("timeout")));
  request.on("error", (error) => count(error.message));
}

const total = rate * seconds;
const started = performance.now();
const timer = setInterval(() => {
  const due = Math.min(total, Math.floor(((performance.now() - started) / 1000) * rate));
  while (sent < due) send();
  if (sent < total || done < sent) return;
  clearInterval(timer);
  console.log(JSON.stringify({ sent, failed, failures, servers }));
  process.exit(0);
}, 5);
