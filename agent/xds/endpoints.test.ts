import { expect, test } from "vitest";
import { encode, type Message, toStruct } from "../../test/controlplane/protos.ts";
import { TYPE_URL } from "../proto/discovery.ts";
import { writeAny } from "../proto/wire.ts";
import { workloadAt } from "./endpoints.ts";

const endpoint = (address: string, metadata: Record<string, Message>): Message => ({
  endpoint: { address: { socket_address: { address, port_value: 9080 } } },
  metadata: { filter_metadata: metadata },
});
const istio = (workload: string): Record<string, Message> => ({
  "envoy.transport_socket_match": toStruct({ tlsMode: "istio" }),
  istio: toStruct({ workload }),
});
const assignment = writeAny(
  TYPE_URL.endpoint,
  encode("envoy.config.endpoint.v3.ClusterLoadAssignment", {
    cluster_name: "outbound|80||details",
    endpoints: [
      { lb_endpoints: [endpoint("10.0.0.1", {}), endpoint("10.0.0.11", istio("eleven;default;e;v1;K"))] },
      {
        lb_endpoints: [endpoint("10.0.0.1", istio("one;default;o;v1;K")), endpoint("fd00::1", istio("six"))],
      },
    ],
  }),
);

test.for([
  ["10.0.0.11", "eleven;default;e;v1;K"],
  ["10.0.0.1", "one;default;o;v1;K"],
  ["fd00::1", "six"],
  ["10.0.0.2", undefined],
  ["", undefined],
] as const)("the workload at `%s` is %s", ([address, workload]) => {
  expect(workloadAt(assignment, address)).toBe(workload);
});

test("bytes that are no endpoints name nobody", () => {
  expect(workloadAt(writeAny(TYPE_URL.endpoint, Buffer.from([0x12, 0x7f, 1])), "10.0.0.1")).toBeUndefined();
});
