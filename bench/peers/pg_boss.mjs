// pg-boss as fast as it goes: batches, a table for each queue, the next tasks in one insert.
import { PgBoss } from "pg-boss";
import { fresh, given, inARow, mix, wake, wave } from "./measure.mjs";

const BATCH = 500;
const LEFT = "SELECT count(*) FROM pgboss.job WHERE state < 'completed'";
const NEXT = { a: () => "b", b: () => "c", due: ({ n }) => (n % 10 ? "task" : "mail") };
// Done jobs of the mix are deleted after a minute, as those of sequencerd's.
const INTERVALS = { superviseIntervalSeconds: 10, maintenanceIntervalSeconds: 10 };

async function connected(url, more = {}) {
  const boss = new PgBoss({ connectionString: url, useListenNotify: true, ...more });
  boss.on("error", (error) => console.error(error));
  await boss.start();
  for (const queue of ["a", "b", "c", "flat", "wave", "wake", "due", "task", "mail"])
    await boss.createQueue(queue, { notify: true, partition: true, deleteAfterSeconds: 60 });
  return boss;
}

const worker = (boss, queues) => async (note) => {
  const options = {
    batchSize: BATCH,
    localConcurrency: 2,
    burstWhenBatchFull: true,
    pollingIntervalSeconds: 0.5, // its least; a job that becomes due is not notified, so waits for it
    notifyPollingIntervalSeconds: 0.5,
  };
  for (const queue of queues)
    await boss.work(queue, options, async (jobs) => {
      const following = {};
      for (const { data } of jobs) {
        note(data.n);
        if (NEXT[queue]) (following[NEXT[queue](data)] ??= []).push({ data });
      }
      for (const [name, next] of Object.entries(following)) await boss.insert(name, next);
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
  mix: async (url) => {
    const boss = await connected(url, INTERVALS);
    const add = (numbers, at) => boss.insert("due", jobs(numbers, at));
    await mix(add, worker(boss, ["due", "task", "mail"]));
  },
};

for (const work of given.works.split(",")) if (works[work]) await fresh(works[work]);
process.exit(0);
