import type { Lab } from "../lab/lab.ts";

/** Opens a connection to every port; 500 at once. Prints a JSON list: [port, "open" or the errno's name], refused ones left out. */
const CONNECT = `
import errno, json, select, socket, sys, time
family, _, _, _, address = socket.getaddrinfo(sys.argv[1], 1)[0]
waiting, found, ports = {}, [], iter(range(1, 65536))
poll = select.epoll()
def settle(fd, name):
    port, sock, _ = waiting.pop(fd)
    poll.unregister(fd)
    sock.close()
    if name != "ECONNREFUSED": found.append([port, name])
more = True
while more or waiting:
    while len(waiting) < 500 and (port := next(ports, None)):
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.connect_ex((address[0], port, *address[2:]))
        waiting[sock.fileno()] = (port, sock, time.monotonic() + 2)
        poll.register(sock, select.EPOLLOUT)
    more = port is not None
    for fd, _ in poll.poll(0.1):
        code = waiting[fd][1].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        settle(fd, errno.errorcode[code] if code else "open")
    for fd in [fd for fd, (_, _, end) in waiting.items() if end < time.monotonic()]:
        settle(fd, "ETIMEDOUT")
print(json.dumps(found))
`;

/**
 * Dials every TCP port of a machine from where the control plane lives.
 * @returns the ports where it was not refused
 * @throws {Error} naming ports that neither accept nor refuse: nothing is known of those
 */
export async function openPorts(lab: Lab, address: string): Promise<number[]> {
  const { stdout } = await lab.exec(["python3", "-c", CONNECT, address], { timeoutMs: 60_000 });
  const found = JSON.parse(stdout) as [number, string][];
  const unclear = found.filter(([, how]) => how !== "open");
  if (unclear.length > 0)
    throw new Error(`${address} left open what it thinks of ${JSON.stringify(unclear)}`);
  return found.map(([port]) => port).sort((a, b) => a - b);
}

/** Asks for the address of a name, three times; prints the number of bytes of the answer, 0 if there is none within a second each. */
const QUESTION = `
import socket, sys
family, _, _, _, address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]))[0]
sock = socket.socket(family, socket.SOCK_DGRAM)
sock.settimeout(1)
sock.connect(address)
for _ in range(3):
    try:
        sock.send(b"\\0\\7\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\7details\\7default\\3svc\\7cluster\\5local\\0\\0\\1\\0\\1")
        print(len(sock.recv(512)))
        break
    except OSError:
        pass
else:
    print(0)
`;

/** For `exec`: a DNS question by UDP, answered if what it prints is not "0". */
export const dnsQuestion = (address: string, port: number): string[] => [
  "python3",
  "-c",
  QUESTION,
  address,
  String(port),
];
