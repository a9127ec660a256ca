// What the programs of this folder share: arguments, a fresh database, and lines of JSON as
// bench/engine.py prints them.
import { parseArgs } from "node:util";
import pg from "pg";

export const { values: given } = parseArgs({
  options: {
    dsn: { type: "string" },
    subjects: { type: "string", default: "50000" },
    wave: { type: "string", default: "20000" },
    samples: { type: "string", default: "200" },
    works: { type: "string", default: "w1,flat,wave,wake" },
    minutes: { type: "string", default: "10" },
    rate: { type: "string", default: "2000" },
  },
});

export const say = (figures) => process.stdout.write(JSON.stringify(figures) + "\n");
export const sleep = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
export const now = () => (performance.timeOrigin + performance.now()) / 1000;

const NAME = "sequencerd_bench";

async function onServer(statement) {
  const client = new pg.Client({ connectionString: given.dsn });
  await client.connect();
  const { rows } = await client.query(statement);
  await client.end();
  return rows;
}

/** Runs a workload in a new database, and drops it. */
export async function fresh(work) {
  await onServer(`DROP DATABASE IF EXISTS ${NAME} WITH (FORCE)`);
  await onServer(`CREATE DATABASE ${NAME}`);
  await onServer("CHECKPOINT");
  const url = new URL(given.dsn);
  url.pathname = `/${NAME}`;
  const client = new pg.Client({ connectionString: url.href });
  await client.connect();
  try {
    await work(url.href, client);
  } finally {
    await client.end();
    // a pool that is still closing would fail if the server ended its connections
    const open = `SELECT pid FROM pg_stat_activity WHERE datname = '${NAME}'`;
    for (let tries = 0; tries < 50 && (await onServer(open)).length > 0; tries++) await sleep(0.1);
    await onServer(`DROP DATABASE ${NAME} WITH (FORCE)`);
  }
}

/** Resolves when a query that counts what is left says 0. */
export async function untilNone(client, query) {
  while (Number((await client.query(query)).rows[0].count) > 0) await sleep(0.05);
}

export function percentiles(values) {
  values.sort((a, b) => a - b);
  const at = (p) => values[Math.min(values.length - 1, Math.floor((values.length * p) / 100))];
  return { p50_s: at(50), p99_s: at(99) };
}

/** Calls `add` with the numbers from 0 to count, in slices. */
export async function inSlices(count, add) {
  for (let low = 0; low < count; low += 5000) {
    await add(Array.from({ length: Math.min(5000, count - low) }, (_, n) => low + n));
  }
}

/** `add` enqueues jobs of so many tasks each, `start` starts a worker that calls its argument at
 * every task. */
export async function inARow(client, work, tasks, add, start, left) {
  const subjects = Number(given.subjects);
  const adding = now();
  await inSlices(subjects, add);
  const enrolled_per_s = subjects / (now() - adding);
  await client.query("ANALYZE");
  await client.query("CHECKPOINT");
  let begun;
  const stop = await start(() => (begun ??= now()));
  await untilNone(client, left);
  const seconds = now() - begun;
  await stop();
  const transitions_per_s = (tasks * subjects) / seconds;
  say({ work, subjects, seconds, transitions_per_s, enrolled_per_s });
}

/** `add` enqueues so many a second, each of which is due after a second, in fifty transactions, as
 * `mix` of bench/scale.py does: how late do those start that started since the line before? `start`
 * starts a worker that calls its argument with the number at every task. */
export async function mix(add, start) {
  const [minutes, rate] = [Number(given.minutes), Number(given.rate)];
  const size = Math.floor(rate / 50);
  const due = new Map();
  let late = [];
  const stop = await start((n) => {
    if (!due.has(n)) return; // the task after the wait
    late.push(now() - due.get(n));
    due.delete(n);
  });
  say({ work: "mix", left: 20, passed: 0 });
  const begun = now();
  for (let transaction = 0, line = 1; line <= 20; ) {
    const passed = now() - begun;
    if (passed >= (minutes * 60 * line) / 20) {
      const { p50_s, p99_s } = percentiles(late);
      const shown = { late_p50_ms: 1000 * p50_s, late_p99_ms: 1000 * p99_s };
      say({ work: "mix", left: 20 - line, passed: late.length, ...shown });
      late = [];
      line++;
    } else if (transaction * size > passed * rate) {
      await sleep(0.01);
    } else {
      const at = now() + 1;
      const numbers = Array.from({ length: size }, (_, n) => transaction * size + n);
      for (const n of numbers) due.set(n, at);
      await add(numbers, new Date(1000 * at));
      transaction++;
    }
  }
  for await (const _ of process.stdin); // bench/scale.py measures the tables, and closes it
  await stop();
}

/** `add` enqueues one job: how long after that does it start, in an idle worker? */
export async function wake(client, add, start, left) {
  const samples = Number(given.samples);
  const late = [];
  let started;
  const stop = await start(() => started(now()));
  await sleep(2);
  for (let n = 0; n < samples; n++) {
    const start = new Promise((done) => (started = done));
    await add([n]);
    const added = now();
    late.push((await start) - added); // below zero if it starts before the insert has returned
    await sleep(0.05);
  }
  await untilNone(client, left);
  await stop();
  const { p50_s, p99_s } = percentiles(late);
  say({ work: "wake", samples, p50_ms: 1000 * p50_s, p99_ms: 1000 * p99_s });
}

/** `add` enqueues for a time, 20 s ahead of 20,000 jobs; how late do they start? */
export async function wave(client, add, start, left) {
  const subjects = Number(given.wave);
  const late = [];
  const at = now() + 5 + (15 * subjects) / 20_000;
  const stop = await start(() => late.push(now() - at));
  await inSlices(subjects, (numbers) => add(numbers, new Date(1000 * at)));
  await client.query("ANALYZE");
  await client.query("CHECKPOINT");
  const spare_s = at - now();
  await sleep(Math.max(0, spare_s));
  await untilNone(client, left);
  const all_done_s = now() - at;
  await stop();
  say({ work: "wave", subjects, spare_s, all_done_s, first_s: Math.min(...late), ...percentiles(late) });
}
