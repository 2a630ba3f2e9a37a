// graphile-worker. Its page on performance recommends for throughput: 24 concurrent jobs, a pool of 25, a local
// queue of 500, and completions in batches with a delay of 0 (https://worker.graphile.org/docs/performance). Its
// documentation of localQueue.size says to make it much higher for very fast tasks; 2,000 was faster than 500 here.
import { Logger, makeWorkerUtils, run as runWorker } from "graphile-worker";
import { main, run, stopRequested } from "./recorder.mjs";

const silent = new Logger(() => () => {});

async function withUtils(connectionString, use) {
  const utils = await makeWorkerUtils({ connectionString, logger: silent });
  try {
    return await use(utils);
  } finally {
    await utils.release();
  }
}

const setup = (url) => withUtils(url, (utils) => utils.migrate());

const producing = (url, use) =>
  withUtils(url, async (utils) => {
    await utils.withPgClient((client) => client.query("SELECT 1"));
    await use({
      many: (numbers) => utils.addJobs(numbers.map((n) => ({ identifier: "noop", payload: { n } }))),
      one: (n) => utils.addJob("noop", { n }),
    });
  });

async function work(connectionString) {
  const runner = await runWorker({
    preset: {
      worker: {
        connectionString,
        concurrentJobs: 24,
        maxPoolSize: 25,
        localQueue: { size: 2000 },
        completeJobBatchDelay: 0,
        failJobBatchDelay: 0,
      },
    },
    logger: silent,
    noHandleSignals: true,
    taskList: { noop: (payload) => run(payload.n) },
  });
  await stopRequested();
  await runner.stop();
  process.exit(0);
}

await main({ setup, producing, work });
