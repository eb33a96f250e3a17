import { Metadata, type ServiceError, status } from "@grpc/grpc-js";
import { expect, test } from "vitest";
import { grpcError } from "./grpc.ts";

const TARGET = {
  address: "10.0.0.1",
  port: 15012,
  serverName: "istiod.istio-system.svc",
  rootCert: "",
  metadata: {},
};

test.for([
  {
    name: "a server of plain HTTP is no istiod, in one line",
    code: status.UNAVAILABLE,
    details:
      "No connection established. Last error: Error: 0A00010B:SSL routines:tls_validate_record_header:wrong version number:tlsany_meth.c:78:\n. Resolution note: ",
    is: "ISTIOD_UNTRUSTED",
    says: /does not speak TLS/,
  },
  {
    name: "a group that does not exist is named",
    code: status.FAILED_PRECONDITION,
    details: "cannot find WorkloadGroup default/ghost",
    is: "ISTIOD_UNREACHABLE",
    says: /cannot find WorkloadGroup default\/ghost/,
  },
  {
    name: "an istiod of another revision is told apart by the names of its certificate",
    code: status.UNAVAILABLE,
    details:
      "Hostname/IP does not match certificate's altnames: Host: istiod-canary.istio-system.svc. is not in the cert's altnames: DNS:istiod.istio-system.svc",
    is: "ISTIOD_UNTRUSTED",
    says: /10\.0\.0\.1:15012 is not istiod\.istio-system\.svc/,
  },
  {
    name: "nothing answers",
    code: status.UNAVAILABLE,
    details: "connect ECONNREFUSED 10.0.0.1:15012",
    is: "ISTIOD_UNREACHABLE",
    says: /does not answer at 10\.0\.0\.1:15012/,
  },
])("$name", ({ code, details, is, says }) => {
  const thrown: ServiceError = Object.assign(new Error(details), { code, details, metadata: new Metadata() });
  const error = grpcError(thrown, TARGET);
  expect(error.code).toBe(is);
  expect(error.message).toMatch(says);
  expect(error.next).toBeDefined();
  expect((error.cause as Error).message).not.toContain("\n");
});
