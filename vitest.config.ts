import { defineConfig } from "vitest/config";

/** The lanes. unit and golden need nothing; the others need root and say so when they do not have it. */
export default defineConfig({
  test: {
    reporters: ["default", "./test/tally.ts"],
    projects: [
      {
        extends: true,
        test: {
          name: "unit",
          include: ["agent/**/*.test.ts", "test/*.test.ts"],
          // The properties take their time on a loaded machine.
          testTimeout: 30_000,
        },
      },
      {
        extends: true,
        test: {
          name: "netns",
          include: ["test/netns/**/*.test.ts"],
          testTimeout: 60_000,
          fileParallelism: false,
        },
      },
      {
        extends: true,
        test: {
          name: "envoy",
          include: ["test/envoy/**/*.test.ts"],
          testTimeout: 120_000,
          hookTimeout: 300_000,
          fileParallelism: false,
        },
      },
      {
        extends: true,
        test: {
          name: "vm",
          include: ["test/vm/**/*.test.ts"],
          testTimeout: 300_000,
          hookTimeout: 600_000,
          fileParallelism: false,
        },
      },
    ],
  },
});
