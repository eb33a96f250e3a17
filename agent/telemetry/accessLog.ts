import { messageOf } from "../core/errors.ts";
import type { ServedStream } from "../platform/grpc.ts";
import { type LoggedBatch, readLoggedBatch } from "../proto/accessLog.ts";
import type { IstioStats } from "./istioStats.ts";

/** Envoy's access log service; the loggers that call it stand where `istio.stats` was taken out (agent/xds/accessLogger.ts). */
export const ACCESS_LOG_SERVICE = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs";

/** Counts what comes on a stream; it is never answered. The first message names the log, which is the direction. */
export function countAccessLog(
  stream: ServedStream,
  stats: Pick<IstioStats, "request" | "connection">,
): void {
  let logName = "";
  stream.onMessage((message) => {
    let batch: LoggedBatch;
    try {
      batch = readLoggedBatch(message);
    } catch (thrown) {
      stream.fail(`not an access log: ${messageOf(thrown)}`);
      return;
    }
    logName = batch.logName ?? logName;
    if (logName !== "inbound" && logName !== "outbound") return;
    for (const entry of batch.requests) stats.request(logName, entry);
    for (const entry of batch.connections) stats.connection(logName, entry);
  });
}
