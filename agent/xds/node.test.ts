import { describe, expect, test } from "vitest";
import { encode, toStruct } from "../../test/controlplane/protos.ts";
import { readNode } from "./node.ts";

const METADATA = {
  NAME: "reviews",
  LABELS: { app: "reviews", version: "v1" },
  PILOT_SAN: ["istiod"],
  NONE: null,
};
const NODE = {
  id: "sidecar~10.0.0.9~reviews.default~default.svc.cluster.local",
  cluster: "reviews.default",
  locality: { region: "r", zone: "z" },
};

const keyOf = (metadata: Record<string, unknown>, more: object = {}): string =>
  readNode(encode("envoy.config.core.v3.Node", { ...NODE, ...more, metadata: toStruct(metadata) })).key;

/** The same members, the other way round, at each level. */
const turned = {
  NONE: null,
  PILOT_SAN: ["istiod"],
  LABELS: { version: "v1", app: "reviews" },
  NAME: "reviews",
};

describe("two nodes are one for istiod", () => {
  test("if only the order of the metadata differs", () => {
    expect(keyOf(turned)).toBe(keyOf(METADATA));
  });

  test("if only Envoy itself is another: an upgrade in the same place", () => {
    const more = {
      user_agent_name: "envoy",
      user_agent_build_version: { version: { major_number: 1, minor_number: 40 } },
      extensions: [{ name: "a", type_urls: ["b"] }],
      client_features: ["envoy.lb.does_not_support_overprovisioning"],
    };
    expect(keyOf(METADATA, more)).toBe(keyOf(METADATA));
  });
});

describe("two nodes are two for istiod", () => {
  test.for<[string, Record<string, unknown>, object]>([
    ["id", METADATA, { id: "sidecar~10.0.0.10~reviews.default~default.svc.cluster.local" }],
    ["cluster", METADATA, { cluster: "details.default" }],
    ["locality", METADATA, { locality: { region: "r", zone: "y" } }],
    ["mode", { ...METADATA, INTERCEPTION_MODE: "TPROXY" }, {}],
    ["label", { ...METADATA, LABELS: { app: "reviews", version: "v2" } }, {}],
    ["item of a list", { ...METADATA, PILOT_SAN: ["other"] }, {}],
    ["null for an empty text", { ...METADATA, NONE: "" }, {}],
  ])("of another %s", ([, metadata, more]) => {
    expect(keyOf(metadata, more)).not.toBe(keyOf(METADATA));
  });

  test("that cannot be read, and are not the same bytes", () => {
    const [one, other] = [Buffer.from([0x0a, 0x7f]), Buffer.from([0x0a, 0x7e])];
    expect(readNode(one).key).toBe(readNode(Buffer.from(one)).key);
    expect(readNode(one).key).not.toBe(readNode(other).key);
  });
});

test("the mode is what istiod takes: REDIRECT where nothing is said", () => {
  const modeOf = (metadata: Record<string, unknown>): string =>
    readNode(encode("envoy.config.core.v3.Node", { metadata: toStruct(metadata) })).mode;
  expect([modeOf({}), modeOf({ INTERCEPTION_MODE: "TPROXY" })]).toEqual(["REDIRECT", "TPROXY"]);
});
