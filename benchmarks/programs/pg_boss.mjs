// pg-boss. Its page on workers names the means for throughput: a large batchSize, burstWhenBatchFull (fetch again at
// once while batches come back full) and localConcurrency; and LISTEN/NOTIFY for quick pick-up
// (https://timgit.github.io/pg-boss/api/workers). A handler gets a whole batch and completes it as a whole.
import { PgBoss } from "pg-boss";
import { main, run, stopRequested } from "./recorder.mjs";

async function started(connectionString, options = {}) {
  const boss = new PgBoss({ connectionString, ...options });
  boss.on("error", (error) => console.error(error));
  await boss.start();
  return boss;
}

async function withBoss(url, use) {
  const boss = await started(url, { supervise: false, schedule: false });
  try {
    return await use(boss);
  } finally {
    await boss.stop({ graceful: false });
  }
}

const setup = (url) => withBoss(url, (boss) => boss.createQueue("noop", { notify: true }));

const producing = (url, use) =>
  withBoss(url, (boss) =>
    use({
      many: (numbers) => boss.insert("noop", numbers.map((n) => ({ data: { n } }))),
      one: (n) => boss.send("noop", { n }),
    }),
  );

async function work(url) {
  const boss = await started(url, { useListenNotify: true });
  const options = { batchSize: 1000, localConcurrency: 2, pollingIntervalSeconds: 0.5, burstWhenBatchFull: true };
  await boss.work("noop", options, async (jobs) => {
    for (const job of jobs) run(job.data.n);
  });
  await stopRequested();
  await boss.stop({ graceful: true, timeout: 5000 });
  process.exit(0);
}

await main({ setup, producing, work });
