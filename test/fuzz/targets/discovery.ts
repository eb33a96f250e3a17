import { isDeepStrictEqual } from "node:util";
import {
  readDeltaRequest,
  readDeltaResponse,
  readSotwRequest,
  writeDeltaRequest,
  writeDeltaResponse,
} from "../../../agent/proto/discovery.ts";
import { decode, encode } from "../../controlplane/protos.ts";
import { type Target, unlessRefused } from "../target.ts";
import { isMalformed, mutateMessage } from "../wire.ts";

const XDS = "envoy.service.discovery.v3";
const error_detail = { code: 13, message: "no" };
const any = { "@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration", name: "r" };

export const target: Target = {
  about:
    "an xDS envelope is refused, or says what Envoy's own .proto files say, and says it again when it is written",
  seeds: [
    encode(`${XDS}.DeltaDiscoveryRequest`, {
      node: { id: "n", cluster: "c" },
      type_url: "t",
      resource_names_subscribe: ["*", "a"],
      resource_names_unsubscribe: ["b"],
      initial_resource_versions: { a: "1" },
      response_nonce: "n1",
      error_detail,
    }),
    encode(`${XDS}.DeltaDiscoveryResponse`, {
      system_version_info: "s",
      resources: [{ name: "r", version: "1", resource: any }],
      type_url: "t",
      removed_resources: ["q"],
      nonce: "n2",
    }),
    encode(`${XDS}.DiscoveryRequest`, {
      version_info: "v",
      resource_names: ["a"],
      type_url: "t",
      response_nonce: "n3",
      error_detail,
    }),
  ],
  mutate: mutateMessage,
  run(bytes) {
    const asked = unlessRefused(() => readDeltaRequest(bytes), isMalformed);
    if (asked !== undefined && !isDeepStrictEqual(readDeltaRequest(writeDeltaRequest(asked)), asked))
      throw new Error("the request changed when it was written again");
    const answer = unlessRefused(() => readDeltaResponse(bytes), isMalformed);
    if (answer !== undefined) {
      if (!isDeepStrictEqual(readDeltaResponse(writeDeltaResponse(answer)), answer))
        throw new Error("the response changed when it was written again");
      const theirs = oracle(`${XDS}.DeltaDiscoveryResponse`, bytes);
      const names = (theirs?.["resources"] as { name: string }[] | undefined)?.map(({ name }) => name);
      const ours = answer.resources.map(({ name }) => name);
      if (names !== undefined && differ(names, ours)) throw new Error("its resources have other names");
    }
    const plain = unlessRefused(() => readSotwRequest(bytes), isMalformed);
    const theirs = plain === undefined ? undefined : oracle(`${XDS}.DiscoveryRequest`, bytes);
    if (theirs !== undefined && differ(theirs["resource_names"] as string[], plain?.names ?? []))
      throw new Error("it asks for other names");
  },
};

/** protobufjs reads a text that is no UTF-8 in its own way. */
const differ = (theirs: readonly string[], ours: readonly string[]): boolean =>
  !ours.some((name) => name.includes("\ufffd")) && !isDeepStrictEqual(theirs, ours);

/** undefined if protobufjs refuses what is inside, which stays bytes here. */
function oracle(type: string, bytes: Uint8Array): Readonly<Record<string, unknown>> | undefined {
  return unlessRefused(
    () => decode(type, bytes),
    () => true,
  );
}
