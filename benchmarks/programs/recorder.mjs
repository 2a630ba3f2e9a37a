// recorder.py and program.py, for Node.
import { closeSync, openSync, readdirSync, readFileSync, writeFileSync, writeSync } from "node:fs";
import { join } from "node:path";

const TICK_MILLISECONDS = 10;
const FULL_WAIT_MILLISECONDS = 5;

const folder = process.env.BENCH_RECORDS ?? ".";
const epoch = BigInt(process.env.BENCH_EPOCH ?? "0");
const epochSeconds = Number(epoch / 1_000_000_000n);
const epochNanoseconds = Number(epoch % 1_000_000_000n);
const numbers = [];
const moments = [];
let cpuBefore;

function microseconds() {
  const [seconds, nanoseconds] = process.hrtime();
  return Math.floor((seconds - epochSeconds) * 1e6 + (nanoseconds - epochNanoseconds) / 1e3);
}

/** Note that job number `n` runs now. */
export function run(n) {
  numbers.push(n);
  moments.push(microseconds());
  if (cpuBefore === undefined) start();
}

function start() {
  cpuBefore = process.cpuUsage();
  const file = openSync(join(folder, `${process.pid}.count`), "w");
  const count = Buffer.alloc(8);
  const timer = setInterval(() => {
    count.writeBigUInt64LE(BigInt(numbers.length));
    writeSync(file, count, 0, 8, 0);
  }, TICK_MILLISECONDS);
  timer.unref();
  process.on("exit", () => {
    closeSync(file);
    const cpu = process.cpuUsage(cpuBefore);
    const content = { cpu_seconds: (cpu.user + cpu.system) / 1e6, numbers, microseconds: moments };
    writeFileSync(join(folder, `${process.pid}.json`), JSON.stringify(content));
  });
}

function runsSoFar() {
  let runs = 0;
  for (const name of readdirSync(folder)) {
    if (!name.endsWith(".count")) continue;
    const content = readFileSync(join(folder, name));
    if (content.length === 8) runs += Number(content.readBigUInt64LE());
  }
  return runs;
}

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Run the verb that the command line names: `node program.mjs VERB URL {"options": …}`; see program.py.
 *
 * `producing` gives its second argument a producer: { many(numbers), one(n) }, which commit by themselves.
 */
export async function main({ setup, work, producing }) {
  const [verb, url, given] = process.argv.slice(2);
  const options = JSON.parse(given ?? "{}");
  if (verb === "setup") await setup(url);
  else if (verb === "work") await work(url);
  else await producing(url, async (producer) => console.log(JSON.stringify(await verbs[verb](producer, options))));
}

function range(start, end) {
  return Array.from({ length: end - start }, (_, index) => start + index);
}

const verbs = {
  async bulk(producer, { jobs, chunk }) {
    const began = microseconds();
    for (let start = 0; start < jobs; start += chunk) await producer.many(range(start, Math.min(start + chunk, jobs)));
    return { seconds: (microseconds() - began) / 1e6 };
  },

  async single(producer, { jobs }) {
    const began = microseconds();
    for (let n = 0; n < jobs; n++) await producer.one(n);
    return { seconds: (microseconds() - began) / 1e6 };
  },

  async pickup(producer, { gaps }) {
    const moments = [];
    for (let n = 0; n < gaps.length; n++) {
      await sleep(gaps[n] * 1e3);
      const before = microseconds();
      await producer.one(n);
      moments.push([n, before, microseconds()]);
    }
    return { moments };
  },

  async feed(producer, { seconds, ahead, chunk }) {
    await producer.many(range(0, chunk));
    while (!runsSoFar()) await sleep(FULL_WAIT_MILLISECONDS);
    let jobs = chunk;
    const began = microseconds();
    const until = began + seconds * 1e6;
    while (microseconds() < until) {
      if (jobs - runsSoFar() < ahead) {
        await producer.many(range(jobs, jobs + chunk));
        jobs += chunk;
      } else {
        await sleep(FULL_WAIT_MILLISECONDS);
      }
    }
    return { jobs, began };
  },
};

export function stopRequested() {
  return new Promise((resolve) => {
    process.once("SIGTERM", resolve);
    process.once("SIGINT", resolve);
  });
}
