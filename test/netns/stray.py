"""Sends one ACK of no connection, `SOURCE DESTINATION PORT`, and says what comes back within a second: `reset` or `nothing`."""
import socket
import struct
import sys

source, destination, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
OWN_PORT = 45_000 + port % 1000


def checksum(data):
    words = sum(struct.unpack(f"!{len(data) // 2}H", data))
    words = (words >> 16) + (words & 0xFFFF)
    return ~(words + (words >> 16)) & 0xFFFF


ACK = 0x10
RST = 0x04
pseudo = socket.inet_aton(source) + socket.inet_aton(destination) + struct.pack("!BBH", 0, socket.IPPROTO_TCP, 20)
head = struct.pack("!HHIIBBHHH", OWN_PORT, port, 1_000_000, 2_000_000, 5 << 4, ACK, 1024, 0, 0)
head = head[:16] + struct.pack("!H", checksum(pseudo + head)) + head[18:]
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as sock:
    sock.settimeout(1)
    sock.sendto(head, (destination, 0))
    try:
        while True:
            packet = sock.recv(4096)
            tcp = packet[(packet[0] & 0xF) * 4 :]
            if struct.unpack("!HH", tcp[:4]) == (port, OWN_PORT) and tcp[13] & RST:
                print("reset")
                break
    except TimeoutError:
        print("nothing")
