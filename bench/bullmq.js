"use strict";
// Which client and which worker of BullMQ are measured? These.
//
//     node bullmq.js client         answers the lines of client.py's protocol
//     node bullmq.js worker NUMBER  runs so many jobs at once
//
// The jobs are those of jobs.py, and leave the same marks in the same file.

const fs = require("node:fs");
const readline = require("node:readline");
const timers = require("node:timers/promises");
const { Queue, Worker } = require("bullmq");

const connection = { path: process.env.BENCH_URL.replace("unix://", "") };

// ---- Jobs, as in jobs.py ---------------------------------------------------------

const LIMIT = 1 << 21;
const TIMES = LIMIT; // where the times begin in the file of marks
const PIDS = 9 * LIMIT;
const ENDS = 13 * LIMIT;
const WAIT = 200; // milliseconds
const marks = fs.openSync(process.env.BENCH_MARKS, "r+");
const count = new Uint8Array(1);
const time = new Float64Array(1);

function monotonic() {
  return Number(process.hrtime.bigint()) / 1e9;
}

function markTime(start, number) {
  time[0] = monotonic();
  fs.writeSync(marks, time, 0, 8, start + 8 * number);
}

/** Count a run; return how many there were. */
function countRun(number) {
  fs.readSync(marks, count, 0, 1, number);
  count[0] += 1;
  fs.writeSync(marks, count, 0, 1, number);
  return count[0];
}

async function noop(number) {
  markTime(TIMES, number);
  return countRun(number);
}

async function busy(number) {
  noop(number);
  const end = monotonic() + 0.001;
  while (monotonic() < end);
}

async function stay(number) {
  fs.writeSync(marks, new Int32Array([process.pid]), 0, 4, PIDS + 4 * number);
  if ((await noop(number)) === 1) await timers.setTimeout(60000);
}

async function wait(number) {
  markTime(TIMES, number);
  await timers.setTimeout(WAIT);
  markTime(ENDS, number);
  countRun(number);
}

const jobs = { noop, busy, stay, noop_coroutine: noop, wait_coroutine: wait };

// ---- The worker ------------------------------------------------------------------

function work(concurrency) {
  const options = { connection, concurrency };
  if (process.env.BENCH_LEASE) {
    options.lockDuration = Number(process.env.BENCH_LEASE);
    options.stalledInterval = options.lockDuration;
  }
  const run = async (job) => {
    await jobs[job.name](job.data);
  };
  const worker = new Worker("bench", run, options);
  worker.on("error", (error) => console.error(error.message));
}

// ---- The client, as in client.py -------------------------------------------------

/** Return the seconds that a call takes. */
async function timed(call) {
  const begunAt = monotonic();
  await call();
  return monotonic() - begunAt;
}

function numbers(first, count) {
  return Array.from({ length: count }, (_, index) => first + index);
}

async function enqueue(queue, first, count, job = "noop") {
  return timed(async () => {
    for (const number of numbers(first, count)) await queue.add(job, number);
  });
}

/** Enqueue by addBulk, a thousand at a time as the other clients do. */
async function enqueueMany(queue, first, count, job = "noop") {
  return timed(async () => {
    for (let begin = first; begin < first + count; begin += 1000) {
      const batch = numbers(begin, Math.min(1000, first + count - begin));
      await queue.addBulk(batch.map((number) => ({ name: job, data: number })));
    }
  });
}

async function enqueueAtTimes(queue, first, count, least, most) {
  const callTimes = [];
  for (const number of numbers(first, count)) {
    await timers.setTimeout(1000 * (least + Math.random() * (most - least)));
    callTimes.push(monotonic());
    await queue.add("noop", number);
  }
  return callTimes;
}

async function enqueueLater(queue, first, count, seconds) {
  const dueTimes = [];
  for (const number of numbers(first, count)) {
    await timers.setTimeout((Math.random() * 2000) / count);
    dueTimes.push(monotonic() + seconds);
    await queue.add("noop", number, { delay: 1000 * seconds });
  }
  return dueTimes;
}

const functions = {
  enqueue,
  enqueue_many: enqueueMany,
  enqueue_at_times: enqueueAtTimes,
  enqueue_later: enqueueLater,
  offers: async (queue, name) => name in functions,
  waiting: (queue) => queue.getWaitingCount(),
};

async function answer() {
  const queue = new Queue("bench", { connection });
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const [name, ...values] = JSON.parse(line);
    const value = await functions[name](queue, ...values);
    fs.writeSync(1, JSON.stringify(value) + "\n");
  }
  process.exit(0);
}

const [role, argument] = process.argv.slice(2);
if (role === "worker") work(Number(argument));
else answer();
