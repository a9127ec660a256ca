// A runner for steps of type Score in Node, without packages. It answers what sequencerd asks:
//   SECRET=whsec_... PORT=8000 node score.mjs
import { createHmac, timingSafeEqual } from "node:crypto";
import { createServer } from "node:http";

const key = Buffer.from(process.env.SECRET.replace("whsec_", ""), "base64");
const done = new Map(); // in a real service a table: what was done under an idempotency key

// Standard Webhooks: https://github.com/standard-webhooks/standard-webhooks
function isSigned(headers, body) {
  const { "webhook-id": id, "webhook-timestamp": time, "webhook-signature": signatures } = headers;
  if (!id || !signatures || Math.abs(Date.now() / 1000 - Number(time)) > 300) return false;
  const wanted = createHmac("sha256", key).update(`${id}.${time}.${body}`).digest();
  return signatures.split(" ").some((signature) => {
    const given = Buffer.from(signature.replace("v1,", ""), "base64");
    return given.length === wanted.length && timingSafeEqual(given, wanted);
  });
}

function score({ id, idempotencyKey, data }, config) {
  if (!done.has(idempotencyKey)) {
    const points = (config.perVisit ?? 10) * (data.visits ?? []).length;
    done.set(idempotencyKey, { id, action: points > 50 ? "next" : "altNext", data: { score: points } });
  }
  return done.get(idempotencyKey);
}

createServer(async (request, response) => {
  let body = "";
  for await (const part of request) body += part;
  if (!isSigned(request.headers, body)) return response.writeHead(401).end();
  const { config, runners } = JSON.parse(body);
  response.writeHead(200, { "Content-Type": "application/json" });
  response.end(JSON.stringify(runners.map((one) => score(one, config))));
}).listen(Number(process.env.PORT ?? 8000), "127.0.0.1");
