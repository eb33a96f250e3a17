import { isStruct, readStruct, type Struct, type StructValue } from "../proto/struct.ts";
import { readMessage } from "../proto/wire.ts";

/** What an Envoy says of itself (envoy.config.core.v3.Node), and what istiod makes of it. */
export interface EnvoyNode {
  /** As it came: istiod gets it unchanged. */
  readonly bytes: Uint8Array;
  /** Equal for two nodes for which istiod makes the same configuration. */
  readonly key: string;
  /** The listeners of one mode are of no use in another: istiod takes REDIRECT where nothing is said. */
  readonly mode: string;
}

/**
 * istiod goes by id 1, cluster 2, metadata 3 and locality 4 (core/v3/base.proto; istio.io/istio, pilot/pkg/xds,
 * `initProxyMetadata`). Version, extensions and features of Envoy's own are no part of the key: another release of Envoy
 * in the same place is sent the same, and what it lacks is taken out for it here. A map has no order, so the metadata's
 * members are sorted. Bytes that are no node are their own key.
 */
export function readNode(bytes: Uint8Array): EnvoyNode {
  let [id, cluster] = ["", ""];
  let metadata: Struct = {};
  const locality: Record<number, string> = {};
  try {
    readMessage(bytes, (field, reader) => {
      if (field === 1) id = reader.string();
      else if (field === 2) cluster = reader.string();
      else if (field === 3) metadata = readStruct(reader.bytes());
      else if (field === 4) {
        readMessage(reader.bytes(), (part, inner) => {
          // region 1, zone 2, sub_zone 3
          if (part > 3) return false;
          locality[part] = inner.string();
          return true;
        });
      } else return false;
      return true;
    });
  } catch {
    return { bytes, key: Buffer.from(bytes).toString("base64"), mode: "REDIRECT" };
  }
  const mode = metadata["INTERCEPTION_MODE"];
  return {
    bytes,
    key: JSON.stringify([id, cluster, sorted(metadata), sorted(locality)]),
    mode: typeof mode === "string" && mode !== "" ? mode : "REDIRECT",
  };
}

function sorted(value: StructValue): unknown {
  if (isStruct(value)) {
    const members = Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1));
    return { members: members.map(([key, member]) => [key, sorted(member)]) };
  }
  return typeof value === "object" && value !== null ? value.map(sorted) : value;
}
