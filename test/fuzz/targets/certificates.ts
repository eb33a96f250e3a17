import { createPrivateKey } from "node:crypto";
import { VmmeshError } from "../../../agent/core/errors.ts";
import { isOfRoots, svidFrom } from "../../../agent/identity/svid.ts";
import { readCertificateResponse } from "../../../agent/proto/istio.ts";
import { encode } from "../../controlplane/protos.ts";
import { type Target, unlessRefused } from "../target.ts";
import { isMalformed, mutateMessage } from "../wire.ts";

/** A key of this file alone, and what an authority that nobody has any more made of it: kept inputs stay what they were. */
const SPIFFE = "spiffe://cluster.local/ns/shop/sa/vm";
const jwk = {
  kty: "EC",
  crv: "P-256",
  x: "GdLjKUp0IiLibhuA-rhkCdEJ83c7bWD0pAxtTQluOKk",
  y: "aS8NytsPLXKdVVWVoSbOiUr0b2N_30zcYGWi8YiM1R0",
  d: "QeBOM96G65H3rt8o395L5LAeouHJRDiLcy5xo7ClRxQ",
};
const key = createPrivateKey({ key: jwk, format: "jwk" }).export({ type: "pkcs8", format: "pem" }).toString();
const pem = (base64: string): string => `-----BEGIN CERTIFICATE-----\n${base64}\n-----END CERTIFICATE-----\n`;
const leaf = pem(
  [
    "MIIBrDCCAVKgAwIBAgIQV3H6zm23CjpQ6XUoKP9vkTAKBggqhkjOPQQDAjAYMRYwFAYDVQQKEw1jbHVzdGVyLmxvY2FsMB4X",
    "DTI2MTEyMzEwMDE1M1oXDTI2MTEyNDEwMDM1M1owADBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABBnS4ylKdCIi4m4bgPq4",
    "ZAnRCfN3O21g9KQMbU0JbjipaS8NytsPLXKdVVWVoSbOiUr0b2N/30zcYGWi8YiM1R2jgZUwgZIwDAYDVR0TAQH/BAIwADAO",
    "BgNVHQ8BAf8EBAMCBaAwHQYDVR0lBBYwFAYIKwYBBQUHAwEGCCsGAQUFBwMCMB8GA1UdIwQYMBaAFId0qtWsCgyh9UtnQZC3",
    "4ORPbhzaMDIGA1UdEQEB/wQoMCaGJHNwaWZmZTovL2NsdXN0ZXIubG9jYWwvbnMvc2hvcC9zYS92bTAKBggqhkjOPQQDAgNI",
    "ADBFAiEAiNsIR2gTR05Wy7GXMUN4au+wOQXlr16z0f2ZNmo5jrICIAtgm5PH9Hp7vkyJkTYXiBMMLICQxpgBSX9+eztW/hmU",
  ].join(""),
);
const root = pem(
  [
    "MIIBcDCCARagAwIBAgIQYwRc5gVNSJ7ehPAY0+AOSTAKBggqhkjOPQQDAjAYMRYwFAYDVQQKEw1jbHVzdGVyLmxvY2FsMB4X",
    "DTI2MTEyMzEwMDE1M1oXDTM2MTEyMDEwMDM1M1owGDEWMBQGA1UEChMNY2x1c3Rlci5sb2NhbDBZMBMGByqGSM49AgEGCCqG",
    "SM49AwEHA0IABGddJhhbKb//umQNo9pqD1/la4KFN/3UEWID9+8KU8wAZOVjG2IKOqgmKhnRa2U5+cDCqOlXxSxLATXBLj+y",
    "bwijQjBAMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgEGMB0GA1UdDgQWBBSHdKrVrAoMofVLZ0GQt+DkT24c2jAK",
    "BggqhkjOPQQDAgNIADBFAiAAtfyeDhMfIQ1zmPlcb+whGO0N8AO1H2yqbx8WA1onhAIhAP7FUlYZNfX4+IOM3a6KeUhpyT2b",
    "8Bo3tHwKMjkkZv4w",
  ].join(""),
);
const answer = (cert_chain: readonly string[]): Uint8Array =>
  encode("istio.v1.auth.IstioCertificateResponse", { cert_chain });

export const target: Target = {
  about: "a CA's answer is refused in words, or is a certificate of ours that leads to its roots",
  covers: /\/agent\/(identity|proto)\//,
  seeds: [
    answer([leaf, root]),
    answer([leaf, root, root]),
    answer([root, root]),
    answer([`${leaf}${root}`, root]),
  ],
  words: ["-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"],
  mutate: mutateMessage,
  run(bytes) {
    const parts = unlessRefused(() => readCertificateResponse(bytes), isMalformed);
    if (parts === undefined) return;
    const svid = unlessRefused(
      () => svidFrom(key, parts, SPIFFE),
      (thrown) => thrown instanceof VmmeshError && /^(CERT_NOT_VALID|IDENTITY_REFUSED)$/.test(thrown.code),
    );
    if (svid === undefined) return;
    if (svid.spiffe !== SPIFFE || !isOfRoots(svid, svid.roots))
      throw new Error("it is accepted and is not ours");
  },
};
