#!/usr/bin/python3
"""Measures what serving costs beside computing, with the programs of a build.

usage: tools/measure_service.py [--build DIR] [--model DIR|FILE] [--weights auto|bf16|int8|...] COMMAND

  streams      so many streams are open at once: whether one is lost, memory a stream, and how fast health
               answers meanwhile, asked by a process of its own
  overhead     tokens a second and CPU time a token of the server beside firesteel-bench at the same batch and
               contexts, in turns
  first-token  the time to a first token on an idle server beside the prefill of such a prompt by firesteel-bench
  slow-reader  32 streams with 20 log-probabilities for each token: what one of them that is not read does to the
               others, by the scheduler's own clock, and when it is ended
  storm        so many requests with random cancels, deadlines and slow readers, 64 at a time, and as many before them:
               whether each ends in one way, and what the server's memory and threads are after them

They want the machine for themselves; docs/benchmarks.md has the figures.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
SEEDS = itertools.count(1000, 1000)  # no two requests have one prompt: none is found in a cache


class Server:
    """The server as a child process, on free ports of the loopback."""

    def __init__(self, options, *more):
        self.log_file = tempfile.TemporaryFile("w+")
        arguments = ["--model", f"m={options.model}", "--weights", options.weights, "--address", "127.0.0.1:0",
                     "--metrics-address", "127.0.0.1:0", *more]
        self.process = subprocess.Popen([options.build / "bin/firesteel-server", *arguments],
                                        stdout=subprocess.PIPE, stderr=self.log_file, text=True)
        line = self.process.stdout.readline()
        found = re.match(r"listening on (\S+), metrics on (\S+)", line)
        if not found:
            sys.exit(f"the server did not start: {line}{self.log()}")
        self.address, self.metrics_address = found.groups()
        self.client = [options.build / "bin/firesteel"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def log(self):
        self.log_file.flush()
        self.log_file.seek(0)
        return self.log_file.read()

    def start(self, command, *arguments):
        return subprocess.Popen([*self.client, command, "--address", self.address, *map(str, arguments)],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, command, *arguments):
        process = self.start(command, *arguments)
        out, err = process.communicate()
        if process.returncode != 0:
            sys.exit(f"firesteel {command}: {err or out}")
        return out

    def load(self, *arguments):
        return json.loads(self.run("load", "--json", "--ignore-eos", "--temperature", "0", *arguments))

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def metrics(self):
        return urllib.request.urlopen(f"http://{self.metrics_address}/metrics").read().decode()

    def metric(self, name, text=None):
        found = re.search(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text or self.metrics(), re.M)
        return float(found.group(1))


@contextlib.contextmanager
def probe(server, result):
    """Asks for health all the while, by a process of its own; `result` takes its JSON."""
    process = server.start("health", "--json", "--repeat", 10**6, "--interval", "20ms")
    time.sleep(0.3)  # its first answer makes the connection
    yield
    process.send_signal(signal.SIGINT)
    result.update(json.loads(process.communicate()[0]))


def health_text(found):
    seconds = found["latency_seconds"]
    return (f"{found['answers']} answers, p50 {seconds['p50'] * 1e3:.1f} ms, p99 {seconds['p99'] * 1e3:.1f} ms, "
            f"worst {seconds['max'] * 1e3:.1f} ms, {found['not_serving']} not SERVING")


def streams(options):
    count = options.count
    queue = ["--max-queue-requests", str(2 * count), "--reader-stall-seconds", "600"]
    with Server(options, *queue) as server:
        server.load("--requests", 4, "--max-tokens", 4)
        idle, busy, memory = {}, {}, {}
        with probe(server, idle):
            time.sleep(2)
        before = server.metric("process_resident_memory_bytes")
        cache = server.metric("firesteel_kv_cache_usage_ratio")
        with probe(server, busy):
            load = server.start("load", "--json", "--ignore-eos", "--concurrency", count, "--requests", count,
                                "--duration", "10m", "--max-tokens", options.max_tokens)
            most = 0
            while load.poll() is None:
                text = server.metrics()
                now = (server.metric("firesteel_requests_running", text) +
                       server.metric("firesteel_requests_waiting", text))
                if now > most:
                    most, memory = now, {"all": server.metric("process_resident_memory_bytes", text),
                                         "cache": server.metric("firesteel_kv_cache_usage_ratio", text)}
                time.sleep(0.1)
            found = json.loads(load.communicate()[0])
        requests = found["requests"]
        print(f"streams           {requests['measured']} asked for, {most:.0f} open at once as seen, "
              f"{requests['succeeded']} complete, {found['tokens']['generated']} tokens in {found['seconds']:.1f} s")
        print(f"memory            {(memory['all'] - before) / most / 1024:.1f} KiB a stream "
              f"(KV cache {cache:.3f} to {memory['cache']:.3f} full meanwhile)")
        print(f"health, idle      {health_text(idle)}")
        print(f"health, meanwhile {health_text(busy)}")


def start_bench(options, *arguments):
    return subprocess.Popen([options.build / "bin/firesteel-bench", "--model", options.model, "--weights",
                             options.weights, "--threads", str(options.threads), "--json", *map(str, arguments)],
                            stdout=subprocess.PIPE, text=True)


def bench(options, *arguments):
    out, _ = start_bench(options, "--repeat", 1, *arguments).communicate()
    return json.loads(out)["results"]


def encode(request):
    """A GenerateRequest in text format as it is on the wire."""
    return subprocess.run(["protoc", f"-I{ROOT / 'proto'}", "--encode=firesteel.v1.GenerateRequest",
                           "firesteel/v1/generation_service.proto"],
                          input=request.encode(), check=True, capture_output=True).stdout


def open_channel(server, *options):
    import grpc  # Debian's python3-grpcio: `streams` does without

    return grpc.insecure_channel(server.address, options=options)


def read_all(call):
    """Reads a stream in a thread of its own, whatever its end."""
    import grpc

    def read():
        with contextlib.suppress(grpc.RpcError):
            for _ in call:
                pass

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def own_text(server, tokens):
    """What the model itself writes, as firesteel-bench has it: token ids."""
    answer = open_channel(server).unary_unary("/firesteel.v1.GenerationService/Generate")(encode(
        f'prompt: "The" max_tokens: {tokens} sampling {{ temperature: 1 top_k: 0 top_p: 1 seed: 1 }} '
        'stopping { ignore_eos: true } output { echo: true return_token_ids: true }'))
    text = subprocess.run(["protoc", f"-I{ROOT / 'proto'}", "--decode=firesteel.v1.GenerateResponse",
                           "firesteel/v1/generation_service.proto"],
                          input=answer, check=True, capture_output=True).stdout.decode()
    return re.findall(r"token_ids: (\d+)", text)[:tokens]


def decode_cost(server, prompt, batch, tokens):
    """Tokens a second, the process's CPU seconds for a token, and the bytes of weights that a step reads, while `batch`
    sequences generate so many tokens each: as in firesteel-bench they go on from one prompt, each by draws of its own.
    (Of prompts that differ, a batch needs more neurons.) Only steps count in which all of them decode, and nothing else
    does; meanwhile nobody looks, for the cores are all busy: to read the metrics costs some 10 ms of them."""
    metrics = {"tokens": "generation_tokens_total", "first": "time_to_first_token_seconds_count",
               "latency": "inter_token_latency_seconds_sum", "latencies": "inter_token_latency_seconds_count",
               "steps": "batch_size_count", "sequences": "batch_size_sum"}

    def look():
        return server.metrics(), server.cpu_seconds()

    def read(text, cpu):
        found = {name: server.metric(f"firesteel_{metric}", text) for name, metric in metrics.items()}
        found["bytes"] = float(re.search(r'^firesteel_weight_bytes_total\{[^}]*"read"[^}]*\} (\S+)$', text, re.M)[1])
        found["cpu"] = cpu
        return found

    started = read(*look())["first"]
    reader = subprocess.Popen([*server.client, "generate", "--address", server.address, "--token-ids", ",".join(prompt),
                               "--n", str(batch), "--max-tokens", str(tokens + 2), "--temperature", "1",
                               "--top-k", "0", "--top-p", "1", "--seed", str(next(SEEDS)), "--ignore-eos"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while read(*(begin := look()))["first"] == started:
        time.sleep(0.01)
    reader.wait()
    begin, end = read(*begin), read(*look())
    spent = {name: end[name] - begin[name] for name in end}
    assert spent["sequences"] == batch * spent["steps"], spent
    return (batch * spent["latencies"] / spent["latency"], spent["cpu"] / spent["tokens"],
            spent["bytes"] / spent["steps"])


def as_bench(options, batch):
    """A server that computes as firesteel-bench does."""
    return Server(options, "--threads", str(options.threads), "--max-batch-size", str(batch),
                  "--max-batch-tokens", "256", "--sublinear-head", "off")


def row(name, pairs, unit, scale, ratio):
    alone, served = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    over = statistics.median(ratio(*p) for p in pairs)
    each = sorted(ratio(*p) for p in pairs)
    spread = f"quartiles {each[len(each) // 4]:+.1%} to {each[-1 - len(each) // 4]:+.1%} of {len(each)}"
    print(f"{name:22}{alone * scale:10.3f} {served * scale:10.3f} {unit:9}{over:+.1%} ({spread})")


def overhead(options):
    batch, prompt, tokens = options.batch, options.prompt, options.decode
    served = []
    with as_bench(options, batch) as server, tempfile.TemporaryDirectory() as scratch:
        text = own_text(server, prompt)
        decode_cost(server, text, batch, tokens)
        turn, done = (pathlib.Path(scratch) / name for name in ("turn", "done"))
        os.mkfifo(turn)
        os.mkfifo(done)
        # Both stay loaded and take turns of seconds: a slow minute of the machine hits both.
        process = start_bench(options, "--batch", batch, "--context", prompt, "--prompt", 1, "--decode", tokens,
                              "--repeat", options.repeat, "--before-each", f"echo >{turn}; read line <{done}")
        for _ in range(options.repeat):
            turn.read_text()
            served.append(decode_cost(server, text, batch, tokens))
            done.write_text("go on\n")
        found = json.loads(process.communicate()[0])
    decode = next(r for r in found["results"] if r["phase"] == "decode")
    alone = [(run["tokens_per_second"], run["cpu_seconds_per_token"]) for run in decode["runs"]]
    # Each turn of the server lies between two of the bench.
    around = [tuple(map(statistics.mean, zip(*pair))) for pair in itertools.pairwise(alone)]
    speeds, cpus = (list(zip(*pair)) for pair in zip(zip(*around), zip(*(cost[:2] for cost in served[1:]))))
    print(f"{'':22}{'bench':>10} {'server':>10}")
    row("tokens a second", speeds, "", 1, lambda alone, served: alone / served - 1)
    row("CPU time a token", cpus, "ms", 1e3, lambda alone, served: served / alone - 1)
    # The bench's bytes are with the KV cache's.
    print(f"read a step           {decode['bytes_per_token'] * batch / 1e6:10.3f} "
          f"{statistics.median(cost[2] for cost in served) / 1e6:10.3f} MB")


def first_token(options):
    prompt, pairs = options.prompt, []
    with as_bench(options, 1) as server:
        server.load("--requests", 4, "--max-tokens", 4)
        for _ in range(options.repeat):
            alone = bench(options, "--batch", 1, "--context", prompt, "--prompt", prompt, "--decode", 1)
            prefill = next(r for r in alone if r["phase"] == "prefill")
            first = server.load("--concurrency", 1, "--requests", 10, "--duration", "10m", "--prompt-tokens", prompt,
                                "--max-tokens", 1, "--seed", next(SEEDS))["time_to_first_token_seconds"]["p50"]
            pairs.append((prompt / prefill["tokens_per_second"]["median"], first))
    print(f"{'':22}{'bench':>10} {'server':>10}")
    row("first token, idle", pairs, "ms", 1e3, lambda alone, served: served / alone - 1)
    print(f"as the client sees it {statistics.median(f - p for p, f in pairs) * 1e3:+.2f} ms")


def one_stream(server, read):
    """A long stream, of a client whose flow-control window does not grow: what it does not read stays with the
    server."""
    channel = open_channel(server, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))
    call = channel.unary_stream("/firesteel.v1.GenerationService/GenerateStream")(encode(
        'prompt: "The cat" max_tokens: 900 sampling { temperature: 0 } stopping { ignore_eos: true } '
        'output { logprobs: 20 }'))
    if read:
        read_all(call)
    while server.metric("firesteel_requests_running") < 1:
        time.sleep(0.01)
    return call


def slow_reader(options):
    stall = 4
    more = ["--max-batch-size", "32", "--reader-stall-seconds", str(stall)]

    def inter_token(server, asleep):
        """Mean time of a token after the first in 31 streams, beside one that is read, or is not."""
        stalls = server.log().count("the reader took nothing")
        other = one_stream(server, not asleep)
        text = server.metrics()
        found = server.load("--concurrency", 31, "--requests", 31, "--duration", "10m", "--max-tokens",
                            options.max_tokens, "--logprobs", 20)
        after = server.metrics()
        while asleep and server.log().count("the reader took nothing") == stalls:
            time.sleep(0.1)
        other.cancel()
        name = "firesteel_inter_token_latency_seconds"
        count = server.metric(f"{name}_count", after) - server.metric(f"{name}_count", text)
        return ((server.metric(f"{name}_sum", after) - server.metric(f"{name}_sum", text)) / count,
                found["requests"]["succeeded"])

    pairs = []
    with Server(options, *more) as server:
        server.load("--requests", 4, "--max-tokens", 4)
        for _ in range(options.repeat):
            awake, complete = inter_token(server, False)
            asleep, beside = inter_token(server, True)
            pairs.append((awake, asleep))
            assert complete == beside == 31, (complete, beside)
        waits = re.findall(r"took nothing for ([0-9.]+m?s)", server.log())
    ratio = statistics.median(asleep / awake for awake, asleep in pairs)
    print(f"31 streams, a token      {statistics.median(p[0] for p in pairs) * 1e3:.2f} ms beside one that is read, "
          f"{statistics.median(p[1] for p in pairs) * 1e3:.2f} ms beside one that is not: {ratio - 1:+.1%}")
    print(f"the one that is not read ended after {', '.join(waits)} (--reader-stall-seconds {stall})")


class Storm:
    """Clients that read, dawdle, give up or run out of time."""

    AT_ONCE = 64
    MANNERS = ("reads", "cancels", "deadline", "slow")

    def __init__(self, server):
        self.wide = open_channel(server, ("grpc.use_local_subchannel_pool", 1))
        # What a slow reader leaves stays with the server: its window is narrow, and does not grow.
        self.narrow = open_channel(server, ("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0),
                                   ("grpc.http2.lookahead_bytes", 1024))
        self.random = random.Random(7)
        self.requests = {manner: [self.request(manner) for _ in range(100)] for manner in self.MANNERS}
        self.lock = threading.Lock()
        self.codes = collections.Counter()

    def request(self, manner):
        tokens = ", ".join(str(self.random.randrange(3, 2000)) for _ in range(self.random.randint(1, 40)))
        output = "output { logprobs: 20 }" if manner == "slow" else ""
        return encode(f"token_ids {{ ids: [{tokens}] }} max_tokens: {self.random.randint(1, 16)} "
                      f"n: {self.random.choice([1, 1, 1, 1, 1, 1, 1, 3])} priority: {self.random.randrange(3)} "
                      f"sampling {{ temperature: 1 seed: {self.random.randrange(1 << 30)} }} {output}")

    def call(self, draw):
        import grpc

        manner = draw.choice(self.MANNERS)
        channel = self.narrow if manner == "slow" else self.wide
        call = channel.unary_stream("/firesteel.v1.GenerationService/GenerateStream")(
            draw.choice(self.requests[manner]), timeout=draw.uniform(0.0005, 0.05) if manner == "deadline" else None)
        messages, cancel_after = 0, draw.randrange(4) if manner == "cancels" else -1
        try:
            if cancel_after == 0:
                call.cancel()
            for _ in call:
                messages += 1
                if messages == cancel_after:
                    call.cancel()
                if manner == "slow":
                    time.sleep(draw.uniform(0, 0.02))
        except grpc.RpcError:
            pass
        with self.lock:
            self.codes[call.code().name] += 1

    def run(self, count):
        """So many calls, 64 at a time; returns when all have ended."""
        left = iter(range(count))

        def work(seed):
            draw = random.Random(seed)
            while True:
                with self.lock:
                    if next(left, None) is None:
                        return
                self.call(draw)

        threads = [threading.Thread(target=work, args=(self.random.random(),)) for _ in range(self.AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def storm(options):
    # A cache so small that all of it has been touched before it counts.
    with Server(options, "--max-batch-size", "16", "--kv-cache-bytes", str(8 << 20), "--log-level", "warn") as server:
        clients = Storm(server)

        def state():
            while server.metric("firesteel_requests_running") + server.metric("firesteel_requests_waiting") > 0:
                time.sleep(0.01)
            status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
            memory, threads = (int(re.search(rf"^{key}:\s+(\d+)", status, re.M)[1]) for key in ("VmRSS", "Threads"))
            return memory / 1024, threads

        clients.run(options.requests)
        clients.codes.clear()
        (before, threads_before), series = state(), []
        for _ in range(10):
            clients.run(options.requests // 10)
            series.append(state())
        print(f"requests  {sum(clients.codes.values())} ended, each once: " +
              ", ".join(f"{code} {count}" for code, count in sorted(clients.codes.items())))
        calls = {name: sum(map(float, re.findall(rf'^grpc_server_{name}_total\{{.*"GenerateStream".*\}} (\S+)$',
                                                 server.metrics(), re.M))) for name in ("started", "handled")}
        print(f"server    {calls['started']:.0f} calls of both halves begun, {calls['handled']:.0f} ended")
        print(f"memory    {before:.2f} MiB after as many before, then {', '.join(f'{m:.2f}' for m, _ in series)}: "
              f"{series[-1][0] - before:+.2f} MiB, {series[-1][0] / before - 1:+.2%}")
        print(f"threads   {threads_before}, then {series[-1][1]}; "
              f"KV cache {server.metric('firesteel_kv_cache_usage_ratio'):.3f} in use")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build/release")
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "models/spark-stories")
    parser.add_argument("--weights", default="auto")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("streams")
    command.add_argument("--count", type=int, default=1000)
    command.add_argument("--max-tokens", type=int, default=32)
    command.set_defaults(run=streams)
    command = commands.add_parser("overhead")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--batch", type=int, default=8)
    command.add_argument("--prompt", type=int, default=32)
    command.add_argument("--decode", type=int, default=128)
    command.add_argument("--repeat", type=int, default=5)
    command.set_defaults(run=overhead)
    command = commands.add_parser("first-token")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--prompt", type=int, default=32)
    command.add_argument("--repeat", type=int, default=3)
    command.set_defaults(run=first_token)
    command = commands.add_parser("storm")
    command.add_argument("--requests", type=int, default=10000)
    command.set_defaults(run=storm)
    command = commands.add_parser("slow-reader")
    command.add_argument("--max-tokens", type=int, default=200)
    command.add_argument("--repeat", type=int, default=2)
    command.set_defaults(run=slow_reader)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
