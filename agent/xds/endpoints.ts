import { readStruct } from "../proto/struct.ts";
import { readAny, readMapEntry, readMessage } from "../proto/wire.ts";

/** The bytes of a SocketAddress with this address: field 2, length-delimited, so that no longer address matches. */
export function needleOf(address: string): Buffer {
  return Buffer.concat([Buffer.from([0x12, address.length]), Buffer.from(address)]);
}

/**
 * The workload that istiod names for the endpoint at `address`: `name;namespace;service;revision;cluster`, in the
 * endpoint's metadata under `istio`, `workload`. A ClusterLoadAssignment has endpoints 2, in them lb_endpoints 2;
 * LbEndpoint: endpoint 1, metadata 3, whose filter_metadata is 1.
 *
 * @param any google.protobuf.Any of a ClusterLoadAssignment
 */
export function workloadAt(any: Uint8Array, address: string): string | undefined {
  const needle = needleOf(address);
  let found: string | undefined;
  try {
    readMessage(readAny(any).value, (field, reader) => {
      if (field !== 2) return false;
      readMessage(reader.bytes(), (inner, locality) => {
        if (inner !== 2) return false;
        found ??= workloadOf(locality.bytes(), needle);
        return true;
      });
      return true;
    });
  } catch {
    return undefined;
  }
  return found;
}

function workloadOf(lbEndpoint: Uint8Array, needle: Buffer): string | undefined {
  let [isIt, workload] = [false, ""];
  readMessage(lbEndpoint, (field, reader) => {
    if (field === 1) isIt = Buffer.from(reader.bytes()).includes(needle);
    else if (field === 3) workload = istioWorkload(reader.bytes());
    else return false;
    return true;
  });
  return isIt && workload !== "" ? workload : undefined;
}

function istioWorkload(metadata: Uint8Array): string {
  let workload = "";
  readMessage(metadata, (field, reader) => {
    if (field !== 1) return false;
    const { key, value } = readMapEntry(reader.bytes());
    if (key !== "istio") return true;
    const named = readStruct(value)["workload"];
    if (typeof named === "string") workload = named;
    return true;
  });
  return workload;
}
