// graphile-worker. Its page on performance recommends for throughput: 24 concurrent jobs, a pool of 25, a local
// queue of 500, and completions in batches with a delay of 0 (https://worker.graphile.org/docs/performance). A local
// queue of 2,000 was faster still here, and its documentation says to try higher ones for very fast tasks.
import { makeWorkerUtils, run as runWorker, Logger } from "graphile-worker";
import { atOddMoments, main, run, seconds, stopRequested } from "./recorder.mjs";

const silent = new Logger(() => () => {});

async function withUtils(connectionString, work) {
  const utils = await makeWorkerUtils({ connectionString, logger: silent });
  try {
    return await work(utils);
  } finally {
    await utils.release();
  }
}

const setup = (url) => withUtils(url, (utils) => utils.migrate());

const bulk = (url, { jobs, chunk }) =>
  withUtils(url, async (utils) => {
    await utils.withPgClient((client) => client.query("SELECT 1"));
    return seconds(async () => {
      for (let start = 0; start < jobs; start += chunk) {
        const specs = [];
        for (let n = start; n < Math.min(start + chunk, jobs); n++) specs.push({ identifier: "noop", payload: { n } });
        await utils.addJobs(specs);
      }
    });
  });

const single = (url, { jobs }) =>
  withUtils(url, async (utils) => {
    await utils.withPgClient((client) => client.query("SELECT 1"));
    return seconds(async () => {
      for (let n = 0; n < jobs; n++) await utils.addJob("noop", { n });
    });
  });

const latency = (url, { gaps }) =>
  withUtils(url, (utils) => atOddMoments({ jobs: gaps.length, gaps }, (n) => utils.addJob("noop", { n })));

async function work(connectionString) {
  const runner = await runWorker({
    preset: {
      worker: {
        connectionString,
        concurrentJobs: 24,
        maxPoolSize: 25,
        localQueue: { size: Number(process.env.BENCH_LOCAL_QUEUE ?? 2000) },
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

await main({ setup, bulk, single, latency, work });
