// The same as recorder.py, for Node.
import { closeSync, openSync, writeFileSync, writeSync } from "node:fs";
import { join } from "node:path";

const TICK_MILLISECONDS = 10;

const folder = process.env.BENCH_RECORDS ?? ".";
const epoch = BigInt(process.env.BENCH_EPOCH ?? "0");
const epochSeconds = Number(epoch / 1_000_000_000n);
const epochNanoseconds = Number(epoch % 1_000_000_000n);
const numbers = [];
const moments = [];
let cpuBefore;

export function microseconds() {
  const [seconds, nanoseconds] = process.hrtime();
  return (seconds - epochSeconds) * 1e6 + Math.floor((nanoseconds - epochNanoseconds) / 1e3);
}

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

/** Run the verb that the command line names: `node program.mjs VERB URL {"options": …}`. */
export async function main(verbs) {
  const [verb, url, options] = process.argv.slice(2);
  const result = await verbs[verb](url, JSON.parse(options ?? "{}"));
  if (result !== undefined) console.log(JSON.stringify(result));
}

export function stopRequested() {
  return new Promise((resolve) => {
    process.once("SIGTERM", resolve);
    process.once("SIGINT", resolve);
  });
}

export async function seconds(work) {
  const began = process.hrtime.bigint();
  await work();
  return { seconds: Number(process.hrtime.bigint() - began) / 1e9 };
}

/** Enqueue single jobs at odd moments: [[number, before, after], …] in microseconds. */
export async function atOddMoments({ jobs, gaps }, enqueue) {
  const moments = [];
  for (let n = 0; n < jobs; n++) {
    await new Promise((resolve) => setTimeout(resolve, gaps[n] * 1e3));
    const before = microseconds();
    await enqueue(n);
    moments.push([n, before, microseconds()]);
  }
  return { moments };
}
