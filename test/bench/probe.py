"""What the bench measures from inside a machine; one JSON value on stdout. Only the standard library of Python 3.11."""
import json, os, socket, statistics, struct, subprocess, sys, time

READY = b"GET /healthz/ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


def ready():
    try:
        with socket.create_connection(("127.0.0.1", 15021), timeout=0.5) as there:
            there.sendall(READY)
            return there.recv(64).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


def start(unit):
    """Seconds from asking systemd for the unit until port 15021 says ready; asked every 10 ms."""
    if ready():
        raise SystemExit("it is ready before it was started")
    began = time.monotonic()
    subprocess.Popen(["systemctl", "start", "--no-block", unit])
    while not ready():
        if time.monotonic() - began > 60:
            raise SystemExit(f"{unit} is not ready after 60 s")
        time.sleep(0.01)
    return time.monotonic() - began


def wall(argv):
    """Seconds that a command takes, and what it printed."""
    began = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True)
    took = time.monotonic() - began
    if done.returncode != 0:
        raise SystemExit(f"{argv} ended with {done.returncode}: {done.stderr[-600:]}")
    return {"seconds": took, "stdout": done.stdout}


def dns(server, name, address, count):
    """Seconds that sequential A queries over UDP take, asked as an ordinary user; each answer is looked at."""
    os.setgid(65534)
    os.setuid(65534)
    question = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0\0\1\0\1"
    took = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there:
        there.settimeout(3)
        there.connect((server, 53))
        for number in range(count):
            query = struct.pack("!6H", number, 0x0100, 1, 0, 0, 0) + question
            began = time.perf_counter()
            there.send(query)
            answer = there.recv(4096)
            took.append(time.perf_counter() - began)
            if answer[:2] != query[:2] or answer[3] & 15 != 0 or not answer.endswith(socket.inet_aton(address)):
                raise SystemExit(f"{name}: not the answer to query {number}: {answer!r}")
    took.sort()
    return {"median": statistics.median(took), "p99": took[int(len(took) * 0.99)]}


def memory(program, word=None):
    """kB of the one process that runs this executable, with this word in its command line if one is given."""
    found = [pid for pid in os.listdir("/proc") if pid.isdigit() and runs(pid, program, word)]
    if len(found) != 1:
        raise SystemExit(f"{len(found)} processes run {program}")
    with open(f"/proc/{found[0]}/smaps_rollup") as rollup:
        sizes = {line.split()[0]: int(line.split()[1]) for line in rollup.readlines()[1:]}
    return {"pss": sizes["Pss:"], "anonymous": sizes["Pss_Anon:"], "rss": sizes["Rss:"]}


def runs(pid, program, word):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line:
            words = line.read().decode().split("\0")
        return os.readlink(f"/proc/{pid}/exe") == program and (word is None or word in words)
    except OSError:
        return False


verb, *words = sys.argv[1:]
if verb == "start":
    answer = start(words[0])
elif verb == "wall":
    answer = wall(words)
elif verb == "dns":
    answer = dns(words[0], words[1], words[2], int(words[3]))
else:
    answer = memory(*words)
print(json.dumps(answer))
