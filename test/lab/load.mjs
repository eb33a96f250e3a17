// Sends RATE requests a second to URL for SECONDS, or without them until its input ends, and prints as one line of JSON what
// became of them (`LoadReport` in load.ts). Runs in a machine, as an ordinary user. To an https URL each request makes a TLS
// connection of its own, with the identity in the folder LOAD_IDENTITY, to nobody but the SPIFFE id LOAD_SERVER.
import { readFileSync } from "node:fs";
import http from "node:http";
import https from "node:https";

const [url, rate] = [process.argv[2], Number(process.argv[3])];
let total = process.argv[4] === undefined ? Number.POSITIVE_INFINITY : rate * Number(process.argv[4]);
const { get } = url.startsWith("https:") ? https : http;
const agent = url.startsWith("https:") ? agentOverTls() : new http.Agent({ keepAlive: true, maxSockets: 64 });
const losses = [];
let firstFailedAt;
const failures = {};
const servers = {};
const answered = [];
const spans = [];
let [sent, done] = [0, 0];

function agentOverTls() {
  const { LOAD_IDENTITY: folder, LOAD_SERVER: server } = process.env;
  const [key, cert, ca] = ["key", "chain", "roots"].map((name) => readFileSync(`${folder}/${name}.pem`));
  const checkServerIdentity = (_host, { subjectaltname }) =>
    subjectaltname === `URI:${server}` ? undefined : new Error(`the server is ${subjectaltname}`);
  // No session is taken up again: only a whole handshake shows and checks both certificates.
  return new https.Agent({ maxSockets: 64, maxCachedSessions: 0, key, cert, ca, checkServerIdentity });
}

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
    if (reason === undefined) {
      if (now - (answered.at(-1) ?? 0) >= 50) answered.push(now);
      return;
    }
    losses.push(at);
    firstFailedAt ??= now;
    failures[reason] = (failures[reason] ?? 0) + 1;
  };
  const request = get(url, { agent, timeout: 5000 }, (response) => {
    let body = "";
    response.setEncoding("utf8");
    response.on("data", (part) => {
      body += part;
    });
    response.on("end", () => {
      const server = /"server": "([^"]+)"/.exec(body)?.[1] ?? "none";
      servers[server] = (servers[server] ?? 0) + 1;
      const words = body.slice(0, 120).trim();
      tell(response.statusCode === 200 ? undefined : `status ${response.statusCode}: ${words}`);
    });
    response.on("error", (error) => tell(error.message));
  });
  request.on("timeout", () => request.destroy(new Error("no answer within 5 s")));
  request.on("error", (error) => tell(error.reason ?? error.message));
}

if (total === Number.POSITIVE_INFINITY) {
  process.stdin.resume();
  process.stdin.on("end", () => {
    total = sent;
  });
}
const started = performance.now();
const timer = setInterval(() => {
  const due = Math.min(total, Math.floor(((performance.now() - started) / 1000) * rate));
  while (sent < due) send();
  if (sent < total || done < sent) return;
  clearInterval(timer);
  const report = { sent, failed: losses.length, failures, servers, losses, firstFailedAt, answered, spans };
  process.stdout.write(`${JSON.stringify(report)}\n`, () => process.exit(0));
}, 5);
