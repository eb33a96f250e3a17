import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { decode, encode, TYPE_PREFIX } from "../../test/controlplane/protos.ts";
import {
  type DeltaRequest,
  type DeltaResponse,
  readDeltaRequest,
  readDeltaResponse,
  readSotwRequest,
  TYPE_URL,
  writeDeltaRequest,
  writeDeltaResponse,
  writeSotwResponse,
} from "./discovery.ts";
import { readCertificateResponse, readNameTable, writeCertificateRequest } from "./istio.ts";
import { writeTlsCertificate, writeValidationContext } from "./secret.ts";
import { readAny, readStatus, writeAny, writeStatus } from "./wire.ts";

const XDS = "envoy.service.discovery.v3";
const text = fc.string({ unit: "grapheme", maxLength: 40 });
const name = fc.string({ minLength: 1, maxLength: 40 });
const bytes = fc.uint8Array({ maxLength: 300 }).map((it) => Uint8Array.from(it));
/** Code 0 is OK: a refusal never has it. */
const rpcStatus = fc.record({ code: fc.integer({ min: 1, max: 16 }), message: text });

const request: fc.Arbitrary<DeltaRequest> = fc.record(
  {
    typeUrl: text,
    subscribe: fc.array(name),
    unsubscribe: fc.array(name),
    initialVersions: fc.array(fc.tuple(name, text)).map((it) => new Map(it)),
    responseNonce: text,
    node: fc.uint8Array({ minLength: 1, maxLength: 300 }).map((it) => Uint8Array.from(it)),
    error: rpcStatus,
  },
  { requiredKeys: ["typeUrl", "subscribe", "unsubscribe", "initialVersions", "responseNonce"] },
);
const response: fc.Arbitrary<DeltaResponse> = fc.record({
  systemVersion: text,
  typeUrl: text,
  nonce: text,
  resources: fc.array(fc.record({ name, version: text, any: bytes })),
  removed: fc.array(name),
});

/** Buffers and arrays of equal content are equal here. */
const plain = (it: unknown): unknown =>
  JSON.parse(
    JSON.stringify(it, (_, value: unknown) => {
      if (value instanceof Map) return [...value];
      return value instanceof Uint8Array ? Buffer.from(value).toString("hex") : value;
    }).replaceAll(/\{"type":"Buffer","data":(\[[^\]]*\])\}/g, (_, data: string) =>
      JSON.stringify(Buffer.from(JSON.parse(data) as number[]).toString("hex")),
    ),
  );

describe("what is written is read back", () => {
  test("delta requests", () => {
    const check = fc.property(request, (it) => {
      expect(plain(readDeltaRequest(writeDeltaRequest(it)))).toEqual(plain(it));
    });
    fc.assert(check);
  });
  test("delta responses", () => {
    const check = fc.property(response, (it) => {
      expect(plain(readDeltaResponse(writeDeltaResponse(it)))).toEqual(plain(it));
    });
    fc.assert(check);
  });
  test("Any and Status", () => {
    const any = fc.property(text, bytes, (typeUrl, value) => {
      expect(plain(readAny(writeAny(typeUrl, value)))).toEqual(plain({ typeUrl, value }));
    });
    fc.assert(any);
    const status = fc.property(rpcStatus, (it) => {
      expect(readStatus(writeStatus(it))).toEqual(it);
    });
    fc.assert(status);
  });
});

test("what is empty and says something by being there is written: a refusal without a reason, a resource without content", () => {
  const refusal = {
    typeUrl: "",
    subscribe: [""],
    unsubscribe: [],
    initialVersions: new Map(),
    responseNonce: "",
  };
  const error = { code: 0, message: "" };
  expect(readDeltaRequest(writeDeltaRequest({ ...refusal, error }))).toEqual({ ...refusal, error });
  const resources = [{ name: "", version: "", any: new Uint8Array() }];
  const empty = { systemVersion: "", typeUrl: "", resources, removed: [""], nonce: "" };
  expect(readDeltaResponse(writeDeltaResponse(empty))).toEqual(empty);
});

describe("Envoy's own .proto files agree", () => {
  test("on a delta request", () => {
    const theirs = decode(
      `${XDS}.DeltaDiscoveryRequest`,
      Buffer.from(
        writeDeltaRequest({
          node: encode("envoy.config.core.v3.Node", {
            id: "sidecar~10.0.0.1~vm.default~default.svc.cluster.local",
          }),
          typeUrl: TYPE_URL.cluster,
          subscribe: ["a"],
          unsubscribe: ["b"],
          initialVersions: new Map([["c", "1"]]),
          responseNonce: "n",
          error: { code: 13, message: "no" },
        }),
      ),
    );
    expect(theirs).toMatchObject({
      node: { id: "sidecar~10.0.0.1~vm.default~default.svc.cluster.local" },
      type_url: TYPE_URL.cluster,
      resource_names_subscribe: ["a"],
      resource_names_unsubscribe: ["b"],
      initial_resource_versions: { c: "1" },
      response_nonce: "n",
      error_detail: { code: 13, message: "no" },
    });
  });

  test("on a delta response, whose resources come out as they went in", () => {
    const value = encode("envoy.config.cluster.v3.Cluster", { name: "a" });
    const theirs = encode(`${XDS}.DeltaDiscoveryResponse`, {
      system_version_info: "v",
      type_url: TYPE_URL.cluster,
      nonce: "n",
      removed_resources: ["b"],
      resources: [{ name: "a", version: "1", resource: { type_url: TYPE_URL.cluster, value } }],
    });
    const ours = readDeltaResponse(theirs);
    expect(ours).toMatchObject({ systemVersion: "v", typeUrl: TYPE_URL.cluster, nonce: "n", removed: ["b"] });
    expect(Buffer.from(ours.resources[0]?.any ?? "")).toEqual(Buffer.from(writeAny(TYPE_URL.cluster, value)));
    expect(plain(readDeltaResponse(writeDeltaResponse(ours)))).toEqual(plain(ours));
  });

  test("on SDS in the old and the new form", () => {
    const any = writeAny(TYPE_URL.secret, writeTlsCertificate("default", "CHAIN", "KEY"));
    const sotw = writeSotwResponse({ version: "v", typeUrl: TYPE_URL.secret, nonce: "n", resources: [any] });
    const theirs = decode(`${XDS}.DiscoveryResponse`, Buffer.from(sotw));
    expect(theirs).toMatchObject({ version_info: "v", type_url: TYPE_URL.secret, nonce: "n" });
    const [resource] = theirs["resources"] as { value: Buffer }[];
    const secret = decode(TYPE_URL.secret.slice(TYPE_PREFIX.length), resource?.value ?? Buffer.alloc(0));
    expect(secret).toMatchObject({
      name: "default",
      tls_certificate: {
        certificate_chain: { inline_bytes: Buffer.from("CHAIN") },
        private_key: { inline_bytes: Buffer.from("KEY") },
      },
    });
    const roots = Buffer.from(writeValidationContext("ROOTCA", "ROOTS"));
    expect(decode(TYPE_URL.secret.slice(TYPE_PREFIX.length), roots)).toMatchObject({
      name: "ROOTCA",
      validation_context: { trusted_ca: { inline_bytes: Buffer.from("ROOTS") } },
    });
    const asked = encode(`${XDS}.DiscoveryRequest`, {
      version_info: "v",
      resource_names: ["default"],
      type_url: TYPE_URL.secret,
      response_nonce: "n",
      error_detail: { code: 3, message: "bad key" },
    });
    expect(readSotwRequest(asked)).toEqual({
      version: "v",
      names: ["default"],
      typeUrl: TYPE_URL.secret,
      responseNonce: "n",
      error: { code: 3, message: "bad key" },
    });
  });

  test("on the CA's messages", () => {
    const wish = decode(
      "istio.v1.auth.IstioCertificateRequest",
      Buffer.from(writeCertificateRequest("CSR", 86_400, "")),
    );
    expect(wish).toMatchObject({ csr: "CSR", metadata: { fields: { CertSigner: { stringValue: "" } } } });
    expect(Number(wish["validity_duration"])).toBe(86_400);
    const answer = encode("istio.v1.auth.IstioCertificateResponse", { cert_chain: ["leaf", "roots"] });
    expect(readCertificateResponse(answer)).toEqual(["leaf", "roots"]);
  });
});

test("no bytes make a reader do anything but answer or throw an Error", () => {
  const readers = [
    readDeltaRequest,
    readDeltaResponse,
    readSotwRequest,
    readAny,
    readStatus,
    (bytes: Uint8Array) => [...readNameTable(bytes)],
    readCertificateResponse,
  ];
  const valid = response.map((it) => writeDeltaResponse(it));
  const damaged = fc.tuple(valid, fc.nat(), fc.nat(255)).map(([it, at, value]) => {
    const copy = Uint8Array.from(it);
    if (copy.length > 0) copy[at % copy.length] = value;
    return copy;
  });
  fc.assert(
    fc.property(fc.oneof(fc.uint8Array({ maxLength: 200 }), damaged), (it) => {
      for (const read of readers) {
        try {
          read(it);
        } catch (thrown) {
          expect(thrown).toBeInstanceOf(Error);
        }
      }
    }),
    { numRuns: 1000 },
  );
});
