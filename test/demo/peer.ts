// The demo's parts that are neither vmmesh nor Envoy: an application, a caller of it, and a name server of the outer world.
import { createSocket } from "node:dgram";
import { createServer } from "node:http";

const USAGE = `usage: node test/demo/peer.ts app PORT     answers every request with its headers as JSON
       node test/demo/peer.ts dns ADDRESS  knows no name: NXDOMAIN to everything
       node test/demo/peer.ts get URL      prints the body; exit status 1 when there is no answer or not 200
`;

const [, , role, argument = ""] = process.argv;
switch (role) {
  case "app":
    createServer((request, response) => {
      response.setHeader("content-type", "application/json").end(`${JSON.stringify(request.headers)}\n`);
    }).listen(Number(argument), "0.0.0.0");
    break;
  case "dns": {
    const socket = createSocket("udp4");
    socket.on("message", (query, from) => {
      // RFC 1035 section 4.1.1: a reply (QR) with the query's opcode and RD, RA, and code 3, to the same question.
      const reply = Buffer.from(query);
      reply[2] = 0x80 | ((query[2] ?? 0) & 0x79);
      reply[3] = 0x83;
      socket.send(reply, from.port, from.address);
    });
    socket.bind(53, argument);
    break;
  }
  case "get":
    try {
      const response = await fetch(argument, { signal: AbortSignal.timeout(5000) });
      process.stdout.write(await response.text());
      process.exitCode = response.status === 200 ? 0 : 1;
    } catch (thrown) {
      const reason = thrown instanceof Error ? (thrown.cause ?? thrown) : thrown;
      process.stdout.write(`${reason instanceof Error ? reason.message : String(reason)}\n`);
      process.exitCode = 1;
    }
    break;
  default:
    process.stderr.write(USAGE);
    process.exitCode = 2;
}
