// pg-boss as fast as it goes: batches, a table for each queue, the next tasks in one insert.
import { PgBoss } from "pg-boss";
import { fresh, given, inARow, wake, wave } from "./measure.mjs";

const BATCH = 500;
const LEFT = "SELECT count(*) FROM pgboss.job WHERE state < 'completed'";
const NEXT = { a: "b", b: "c" };

async function connected(url) {
  const boss = new PgBoss({ connectionString: url, useListenNotify: true });
  boss.on("error", (error) => console.error(error));
  await boss.start();
  for (const queue of ["a", "b", "c", "flat", "wave", "wake"])
    await boss.createQueue(queue, { notify: true, partition: true });
  return boss;
}

const worker = (boss, queues) => async (note) => {
  const options = {
    batchSize: BATCH,
    localConcurrency: 2,
    burstWhenBatchFull: true,
    pollingIntervalSeconds: 0.5,
    notifyPollingIntervalSeconds: 0.5,
  };
  for (const queue of queues)
    await boss.work(queue, options, async (jobs) => {
      for (const _ of jobs) note();
      if (NEXT[queue]) await boss.insert(NEXT[queue], jobs.map(({ data }) => ({ data })));
    });
  return () => boss.stop({ graceful: false });
};

const jobs = (numbers, startAfter) => numbers.map((n) => ({ data: { n }, startAfter }));

const works = {
  w1: async (url, client) => {
    const boss = await connected(url);
    const add = (numbers) => boss.insert("a", jobs(numbers));
    await inARow(client, "w1", 3, add, worker(boss, ["a", "b", "c"]), LEFT);
  },
  flat: async (url, client) => {
    const boss = await connected(url);
    const add = (numbers) => boss.insert("flat", jobs(numbers));
    await inARow(client, "flat", 1, add, worker(boss, ["flat"]), LEFT);
  },
  wake: async (url, client) => {
    const boss = await connected(url);
    const add = ([n]) => boss.send("wake", { n });
    await wake(client, add, worker(boss, ["wake"]), LEFT);
  },
  wave: async (url, client) => {
    const boss = await connected(url);
    const add = (numbers, at) => boss.insert("wave", jobs(numbers, at));
    await wave(client, add, worker(boss, ["wave"]), LEFT);
  },
};

for (const work of given.works.split(",")) if (works[work]) await fresh(works[work]);
process.exit(0);
