// graphile-worker with a local queue, completing jobs in batches.
import { Logger, makeWorkerUtils, run } from "graphile-worker";
import { fresh, given, inARow, wake, wave } from "./measure.mjs";

const LEFT = "SELECT count(*) FROM graphile_worker._private_jobs";
const logger = new Logger(() => () => {});

async function utilities(url) {
  const made = await makeWorkerUtils({ connectionString: url, logger });
  await made.migrate();
  return made;
}

const worker = (url) => async (note) => {
  const then = (next) => async (payload, helpers) => {
    note();
    if (next) await helpers.addJob(next, payload);
  };
  const runner = await run({
    taskList: { a: then("b"), b: then("c"), c: then(), flat: then(), wave: then(), wake: then() },
    noHandleSignals: true,
    preset: {
      worker: {
        connectionString: url,
        concurrentJobs: 24,
        maxPoolSize: 26,
        pollInterval: 500,
        logger,
        localQueue: { size: 500 },
        completeJobBatchDelay: 0,
        failJobBatchDelay: 0,
      },
    },
  });
  return () => runner.stop();
};

const jobs = (identifier, numbers, runAt) =>
  numbers.map((n) => ({ identifier, payload: { n }, runAt }));

const works = {
  w1: async (url, client) => {
    const made = await utilities(url);
    const add = (numbers) => made.addJobs(jobs("a", numbers));
    await inARow(client, "w1", 3, add, worker(url), LEFT);
    await made.release();
  },
  flat: async (url, client) => {
    const made = await utilities(url);
    const add = (numbers) => made.addJobs(jobs("flat", numbers));
    await inARow(client, "flat", 1, add, worker(url), LEFT);
    await made.release();
  },
  wake: async (url, client) => {
    const made = await utilities(url);
    await wake(client, (numbers) => made.addJobs(jobs("wake", numbers)), worker(url), LEFT);
    await made.release();
  },
  wave: async (url, client) => {
    const made = await utilities(url);
    const add = (numbers, at) => made.addJobs(jobs("wave", numbers, at));
    await wave(client, add, worker(url), LEFT);
    await made.release();
  },
};

for (const work of given.works.split(",")) if (works[work]) await fresh(works[work]);
process.exit(0);
