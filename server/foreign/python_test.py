"""Firesteel as a Python client meets it: grpcio and protobuf from Debian, stubs from the .proto files.

Drives every row of docs/errors.md against the real program, TLS, many streams at once and a reader that
does not read. FIRESTEEL_SERVER_PROGRAM and FIRESTEEL_CLIENT_PROGRAM name the programs; the first argument is a folder for what protoc makes.
"""

import asyncio
import concurrent.futures
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request

import grpc
import grpc.aio

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ["FIRESTEEL_SERVER_PROGRAM"]
CLIENT = os.environ["FIRESTEEL_CLIENT_PROGRAM"]
MODEL = ROOT / "models/spark-stories"


def generate_stubs(folder):
    """Python code of every .proto file, importable from `folder`."""
    protos = [str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto")]
    plugin = shutil.which("grpc_python_plugin")
    subprocess.run(["protoc", f"--plugin=protoc-gen-grpc={plugin}", f"-I{ROOT / 'proto'}",
                    f"--python_out={folder}", f"--grpc_out={folder}", *protos], check=True)
    # Packages of ours beside those of the same name that are installed (google, grpc).
    import google
    google.__path__.append(f"{folder}/google")
    sys.path.insert(0, folder)


STUBS = sys.argv.pop(1) if len(sys.argv) > 1 else tempfile.mkdtemp()
os.makedirs(STUBS, exist_ok=True)
generate_stubs(STUBS)

from firesteel.v1 import admin_service_pb2 as admin_pb  # noqa: E402
from firesteel.v1 import admin_service_pb2_grpc as admin_grpc  # noqa: E402
from firesteel.v1 import generation_service_pb2 as pb  # noqa: E402
from firesteel.v1 import generation_service_pb2_grpc as pb_grpc  # noqa: E402
from firesteel.v1 import model_service_pb2 as model_pb  # noqa: E402
from firesteel.v1 import model_service_pb2_grpc as model_grpc  # noqa: E402
from google.api import annotations_pb2  # noqa: E402
from google.protobuf import descriptor_pb2  # noqa: E402
from google.rpc import error_details_pb2, status_pb2  # noqa: E402
from inference import grpc_service_pb2 as kserve_pb  # noqa: E402
from inference import grpc_service_pb2_grpc as kserve_grpc  # noqa: E402


def method(channel, path, request, response, streamed=False):
    """A method without a stub: of health, whose package hides behind grpcio's own."""
    make = channel.unary_stream if streamed else channel.unary_unary
    return make(path, request_serializer=request, response_deserializer=response)


class Server:
    """The program as a child process."""

    def __init__(self, *more, model=MODEL):
        self.err = tempfile.TemporaryFile("w+")
        arguments = ["--model", f"spark-stories={model}", "--address", "127.0.0.1:0",
                     "--metrics-address", "127.0.0.1:0", *more]
        if "--kv-cache-bytes" not in more:
            arguments += ["--kv-cache-bytes", "256MiB"]
        self.process = subprocess.Popen([PROGRAM, *arguments], stdout=subprocess.PIPE,
                                        stderr=self.err, text=True)
        line = self.process.stdout.readline()
        found = re.match(r"listening on (\S+), metrics on (\S+)", line)
        if not found:
            raise RuntimeError(f"the server did not start: {line}{self.log()}")
        self.address, self.metrics_address = found.groups()
        self.channel = grpc.insecure_channel(self.address)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()
        self.process.kill()
        self.process.wait()

    def log(self):
        self.err.flush()
        self.err.seek(0)
        return self.err.read()

    def admin(self):
        while not (found := re.search(r"serving .*admin_address=(\S+)", self.log())):
            time.sleep(0.01)
        return admin_grpc.AdminServiceStub(grpc.insecure_channel(found.group(1)))

    @property
    def generation(self):
        return pb_grpc.GenerationServiceStub(self.channel)

    def metric(self, pattern):
        text = urllib.request.urlopen(f"http://{self.metrics_address}/metrics").read().decode()
        found = re.search(f"^{pattern} (\\S+)$", text, re.M)
        return float(found.group(1)) if found else None


def story(max_tokens=12, **more):
    return pb.GenerateRequest(prompt="Once upon a time", max_tokens=max_tokens,
                              sampling=pb.SamplingParameters(temperature=0),
                              stopping=pb.StoppingCriteria(ignore_eos=True), **more)


def error_of(call):
    try:
        call()
    except grpc.RpcError as error:
        return error
    raise AssertionError("the call went through")


def details_of(error):
    """The details of an error, by the short names of their types."""
    details = {}
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        for detail in status_pb2.Status.FromString(value).details:
            name = detail.type_url.rsplit(".", 1)[-1]
            message = getattr(error_details_pb2, name)()
            detail.Unpack(message)
            details[name] = message
    return details


def token_file(folder, *clients):
    """A token file of (name, token, further lines)."""
    path = pathlib.Path(folder) / "tokens.yaml"
    path.write_text("".join(
        f"- name: {name}\n  sha256: {hashlib.sha256(token.encode()).hexdigest()}\n{lines}"
        for name, token, lines in clients))
    return str(path)


def bearer(token):
    return (("authorization", f"Bearer {token}"),)


# --- Errors ---

def documented_rows():
    """{reason: (code, set of details, local)} of docs/errors.md."""
    rows = {}
    for line in (ROOT / "docs/errors.md").read_text().splitlines():
        if found := re.match(r"\| `([A-Z_]+)` \| ([A-Z_]+) \| ([^|]*)\|", line):
            words = set(re.split(r"[ ,]+", found.group(3).strip())) - {""}
            rows[found.group(1)] = (found.group(2), words - {"local"}, "local" in words)
    return rows


def overflowing_model(folder):
    """A model that loads and can't compute: its last norm multiplies by the largest number there is."""
    copy = pathlib.Path(folder) / "overflowing"
    shutil.copytree(MODEL, copy)
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    begin, end = header["model.norm.weight"]["data_offsets"]
    pattern = {"BF16": b"\x7f\x7f", "F32": b"\xff\xff\x7f\x7f"}[header["model.norm.weight"]["dtype"]]
    data[8 + length + begin:8 + length + end] = pattern * ((end - begin) // len(pattern))
    path.chmod(0o644)
    path.write_bytes(data)
    return copy


class Errors(unittest.TestCase):
    """One method a row: provoke_REASON returns the error that came."""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def provoke_INVALID_REQUEST(self):
        with Server() as server:
            return error_of(lambda: server.generation.Generate(story(0)))

    def provoke_MALFORMED_REQUEST(self):
        with Server() as server:
            call = method(server.channel, "/firesteel.v1.GenerationService/Generate",
                          lambda data: data, pb.GenerateResponse.FromString)
            return error_of(lambda: call(b"\xff\xff"))

    def provoke_MODEL_NOT_FOUND(self):
        with Server() as server:
            return error_of(lambda: server.generation.Tokenize(pb.TokenizeRequest(model="gpt")))

    def provoke_METHOD_NOT_FOUND(self):
        with Server() as server:
            call = method(server.channel, "/firesteel.v1.GenerationService/Sing", lambda data: data,
                          lambda data: data)
            return error_of(lambda: call(b""))

    def provoke_OVERLOADED(self):
        with Server("--max-batch-size", "1", "--max-queue-requests", "1") as server:
            running = server.generation.GenerateStream(story(900))
            next(running)
            # One of them waits, the others find no place to.
            calls = [server.generation.Generate.future(story(900)) for _ in range(3)]
            while not (refused := [c for c in calls if c.done() and c.exception()]):
                time.sleep(0.01)
            return refused[0].exception()

    def provoke_EXCEEDS_CAPACITY(self):
        with Server("--kv-cache-bytes", "4MiB") as server:
            return error_of(lambda: server.generation.Generate(story(900, n=16)))

    def provoke_TOO_MANY_REQUESTS(self):
        tokens = token_file(self.folder, ("one", "token", "  max_concurrent_requests: 1\n"))
        with Server("--auth-token-file", tokens) as server:
            stream = server.generation.GenerateStream(story(900), metadata=bearer("token"))
            next(stream)
            return error_of(lambda: server.generation.Generate(story(), metadata=bearer("token")))

    def provoke_TOKENS_USED_UP(self):
        tokens = token_file(self.folder, ("one", "token", "  tokens_per_minute: 1\n"))
        with Server("--auth-token-file", tokens) as server:
            server.generation.Generate(story(), metadata=bearer("token"))
            return error_of(lambda: server.generation.Generate(story(), metadata=bearer("token")))

    def provoke_TOKEN_MISSING(self):
        with Server("--auth-token-file", token_file(self.folder, ("one", "token", ""))) as server:
            return error_of(lambda: server.generation.Generate(story()))

    def provoke_TOKEN_UNKNOWN(self):
        with Server("--auth-token-file", token_file(self.folder, ("one", "token", ""))) as server:
            return error_of(lambda: server.generation.Generate(story(), metadata=bearer("tokem")))

    def provoke_ADMIN_ONLY(self):
        tokens = token_file(self.folder, ("one", "token", "  admin: false\n"))
        with Server("--auth-token-file", tokens, "--admin-address", "127.0.0.1:0") as server:
            return error_of(lambda: server.admin().UnloadModel(
                admin_pb.UnloadModelRequest(name="spark-stories"), metadata=bearer("token")))

    def provoke_MODEL_NOT_LOADABLE(self):
        with Server("--admin-address", "127.0.0.1:0") as server:
            return error_of(lambda: server.admin().LoadModel(
                admin_pb.LoadModelRequest(name="spark-stories", path="/no/such/folder")))

    def provoke_LAST_MODEL(self):
        with Server("--admin-address", "127.0.0.1:0") as server:
            return error_of(lambda: server.admin().UnloadModel(
                admin_pb.UnloadModelRequest(name="spark-stories")))

    def provoke_LOAD_IN_PROGRESS(self):
        with Server("--admin-address", "127.0.0.1:0") as server:
            admin = server.admin()
            loads = [admin.ReloadModel.future(admin_pb.ReloadModelRequest()) for _ in range(8)]
            errors = [load.exception() for load in loads if load.exception()]
            self.assertLess(len(errors), 8, "one of them went through")
            return errors[0]

    def provoke_SERVER_DRAINING(self):
        with Server() as server:
            stream = server.generation.GenerateStream(story(900))
            next(stream)
            server.process.send_signal(signal.SIGTERM)
            return error_of(lambda: [server.generation.Generate(story(1)) for _ in range(1000)])

    def provoke_REQUEST_CANCELLED(self):
        with Server() as server:
            stream = server.generation.GenerateStream(story(900))
            next(stream)
            stream.cancel()
            return error_of(lambda: list(stream))

    def provoke_READER_STALLED(self):
        with Server("--reader-stall-seconds", "0.3") as server:
            stream = narrow(server).GenerateStream(wide_story())
            pattern = r'grpc_server_handled_total\{grpc_code="Canceled",grpc_method="GenerateStream".*\}'
            while not server.metric(pattern):
                time.sleep(0.05)
            error = error_of(lambda: list(stream))
            self.assertIn("the reader took nothing", server.log())
            return error

    def provoke_DEADLINE_EXCEEDED(self):
        with Server() as server:
            return error_of(lambda: server.generation.Generate(story(900), timeout=0.2))

    def provoke_INTERNAL_ERROR(self):
        with Server("--warmup", "off", model=overflowing_model(self.folder)) as server:
            return error_of(lambda: server.generation.Generate(story()))

    def test_every_row(self):
        rows = documented_rows()
        self.assertGreater(len(rows), 15)
        for reason, (code, details, local) in rows.items():
            with self.subTest(reason):
                error = getattr(self, f"provoke_{reason}")()
                self.assertEqual(error.code().name, code)
                found = details_of(error)
                if local and not found:
                    continue
                self.assertEqual(found.pop("ErrorInfo").reason, reason)
                self.assertEqual(set(found), details)
                if reason != "MALFORMED_REQUEST":  # gRPC ends that call by itself
                    keys = [key for key, _ in error.trailing_metadata()]
                    self.assertEqual(keys.count("x-request-id"), 1)

    # By gRPC itself, before any code of ours: there are no details, and no counting of most calls.
    def test_a_message_over_the_limit(self):
        limit = 1 << 20
        long = "a" * (limit + 1)
        infer = kserve_pb.ModelInferRequest(id=long)
        with Server("--max-message-bytes", str(limit)) as server:
            generation, channel = server.generation, server.channel
            kserve = kserve_grpc.GRPCInferenceServiceStub(channel)
            health = method(channel, "/grpc.health.v1.Health/Check", lambda data: data, lambda data: data)
            for call in (lambda: generation.Generate(pb.GenerateRequest(prompt=long)),
                         lambda: list(generation.GenerateStream(pb.GenerateRequest(prompt=long))),
                         lambda: generation.Tokenize(pb.TokenizeRequest(text=long)),
                         lambda: kserve.ModelInfer(infer),
                         lambda: list(kserve.ModelStreamInfer(iter([infer]))),
                         lambda: health(long.encode())):
                error = error_of(call)
                self.assertEqual(error.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
                self.assertRegex(error.details(), f"larger than max.*{limit}")
            self.assertEqual(generation.Generate(story()).usage.generated_tokens, 12, "it serves on")
            handled = 'grpc_server_handled_total{grpc_code="Canceled",grpc_method="ModelStreamInfer",'
            while not server.metric(re.escape(handled) + ".*"):
                time.sleep(0.01)
            started = 'grpc_server_started_total{grpc_method="Generate",'
            self.assertEqual(server.metric(re.escape(started) + ".*"), 1, "as docs/metrics.md says")


# --- What a stream costs ---

def narrow(server):
    """A client whose flow-control window does not grow: what it does not read stays with the server."""
    return pb_grpc.GenerationServiceStub(grpc.insecure_channel(server.address, options=[
        ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]))


def wide_story(max_tokens=400, n=8):
    """Much text for few steps: every token with twenty alternatives."""
    request = story(max_tokens, n=n)
    request.output.logprobs = 20
    return request


class Streams(unittest.TestCase):

    def test_a_reader_that_does_not_read_hurts_nobody_else(self):
        with Server("--reader-stall-seconds", "1", "--max-batch-size", "32") as server:

            def inter_token(with_sleeper):
                """Mean time of a token after the first, as the scheduler saw it."""
                sleeper = narrow(server).GenerateStream(wide_story(900, n=1)) if with_sleeper else None
                request = story(60)
                request.output.logprobs = 20
                with concurrent.futures.ThreadPoolExecutor(31) as pool:
                    ends = list(pool.map(
                        lambda _: list(server.generation.GenerateStream(request))[-1], range(31)))
                for end in ends:
                    self.assertEqual(end.usage.generated_tokens, 60)
                seconds = sum(e.timings.decode.ToTimedelta().total_seconds() for e in ends) / 31 / 59
                return seconds, sleeper

            alone, _ = inter_token(False)
            beside, sleeper = inter_token(True)
            error = error_of(lambda: (time.sleep(0), self._wait_for_stall(server), list(sleeper)))
            self.assertEqual(error.code(), grpc.StatusCode.CANCELLED)
            print(f"\n31 streams: {alone * 1e3:.2f} ms a token alone, {beside * 1e3:.2f} ms beside a "
                  "stream that is not read")

    def _wait_for_stall(self, server):
        while "the reader took nothing" not in server.log():
            time.sleep(0.05)

    # Long streams hold the batch until all of the thousand are admitted and wait behind them.
    def test_a_thousand_streams_at_once(self):
        count, holders = 1000, 64
        with Server("--max-queue-requests", "2000", "--max-batch-size", str(holders),
                    "--kv-cache-bytes", "512MiB") as server:
            server.generation.Generate(story(4))
            before = server.metric("process_resident_memory_bytes")

            async def run():
                async with grpc.aio.insecure_channel(server.address) as channel:
                    stub = pb_grpc.GenerationServiceStub(channel)

                    async def one():
                        last = None
                        async for last in stub.GenerateStream(story(8)):
                            pass
                        return last.usage.generated_tokens

                    holding = [stub.GenerateStream(story(1000)) for _ in range(holders)]
                    for stream in holding:
                        await stream.initial_metadata()
                    tasks = [asyncio.create_task(one()) for _ in range(count)]
                    waiting = 'firesteel_requests_waiting{model_name="spark-stories"}'
                    while server.metric(re.escape(waiting)) < count:
                        self.assertFalse(any(task.done() for task in tasks), "they hold the batch")
                        await asyncio.sleep(0.05)
                    for stream in holding:
                        stream.cancel()
                    peak = before
                    while not all(task.done() for task in tasks):
                        peak = max(peak, server.metric("process_resident_memory_bytes"))
                        await asyncio.sleep(0.1)
                    return await asyncio.gather(*tasks), peak

            # By a process of its own, as a probe does it: this one is busy with its streams.
            probe = subprocess.Popen([CLIENT, "health", "--address",
                                      server.address, "--repeat", "1000000", "--interval", "20ms"],
                                     stdout=subprocess.PIPE, text=True)
            tokens, peak = asyncio.run(run())
            probe.send_signal(signal.SIGINT)
            health = probe.communicate()[0].strip()
            self.assertEqual(tokens, [8] * count, "none is lost")
            self.assertRegex(health, "^SERVING; [1-9][0-9]* answers, 0 of them not SERVING")
            print(f"\n{count} streams: {(peak - before) / count / 1024:.1f} KiB a stream; health: {health}")


# --- The rest of the API, from Python ---

class Api(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.server = Server("--admin-address", "127.0.0.1:0")

    @classmethod
    def tearDownClass(cls):
        cls.server.__exit__()

    def test_generate_score_and_tokens(self):
        stub = self.server.generation
        whole = stub.Generate(story(20))
        streamed = "".join(m.sequence.text for m in stub.GenerateStream(story(20)))
        self.assertEqual(whole.sequences[0].text, streamed)
        tokens = stub.Tokenize(pb.TokenizeRequest(text="The dragon")).tokens
        ids = [token.token_id for token in tokens]
        self.assertEqual(stub.Detokenize(pb.DetokenizeRequest(token_ids=ids)).text.strip(), "The dragon")

        # What Generate says of its own tokens is what Score says of them.
        request = story(6)
        request.output.logprobs = 0
        request.output.return_token_ids = True
        sequence = stub.Generate(request).sequences[0]
        prompt = [t.token_id for t in stub.Tokenize(pb.TokenizeRequest(text=request.prompt)).tokens]
        score = stub.Score(pb.ScoreRequest(token_ids=pb.TokenIds(
            ids=prompt + list(sequence.token_ids))))
        self.assertFalse(score.tokens[0].HasField("logprob"))
        for told, scored in zip(sequence.logprobs, score.tokens[len(prompt):]):
            self.assertEqual(told.token_id, scored.token_id)
            self.assertTrue(math.isclose(told.logprob, scored.logprob, abs_tol=0.05), (told, scored))

    def test_biases_and_penalties_change_what_is_drawn(self):
        stub = self.server.generation
        request = story(8)
        request.output.return_token_ids = True
        first = stub.Generate(request).sequences[0].token_ids[0]
        request.sampling.logit_bias[first] = -100
        self.assertNotIn(first, stub.Generate(request).sequences[0].token_ids)

    def test_kserve(self):
        stub = kserve_grpc.GRPCInferenceServiceStub(self.server.channel)
        self.assertTrue(stub.ServerReady(kserve_pb.ServerReadyRequest()).ready)
        request = kserve_pb.ModelInferRequest(model_name="spark-stories", id="7")
        request.parameters["max_tokens"].int64_param = 8
        request.parameters["temperature"].double_param = 0
        request.parameters["details"].bool_param = True
        request.parameters["ignore_eos"].bool_param = True
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(b"Once upon a time")
        answer = {o.name: o for o in stub.ModelInfer(request).outputs}
        text = answer["text_output"].contents.bytes_contents[0].decode()
        self.assertEqual(text, self.server.generation.Generate(story(8)).sequences[0].text)
        self.assertEqual(json.loads(answer["details"].contents.bytes_contents[0])["generated_tokens"], 8)
        messages = list(stub.ModelStreamInfer(iter([request])))
        self.assertEqual("".join(
            m.infer_response.outputs[0].contents.bytes_contents[0].decode() for m in messages), text)

    # Requests go on while the model is replaced under them: none fails.
    def test_reload_under_load(self):
        stop, failures, calls = threading.Event(), [], []

        def load():
            while not stop.is_set():
                try:
                    self.server.generation.Generate(story(3))
                    calls.append(1)
                except grpc.RpcError as error:
                    failures.append(error)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        admin = self.server.admin()
        for _ in range(3):
            model = admin.ReloadModel(admin_pb.ReloadModelRequest()).model
            self.assertEqual(model.name, "spark-stories")
        self.server.process.send_signal(signal.SIGHUP)
        while self.server.log().count("model replaced") < 4:
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])
        print(f"\nreload under load: {len(calls)} calls, none failed")

    def test_server_info(self):
        info = model_grpc.ModelServiceStub(self.server.channel).GetServerInfo(
            model_pb.GetServerInfoRequest())
        self.assertEqual(list(info.models), ["spark-stories"])


class EveryRpc(unittest.TestCase):
    """Each method of the descriptor set, called once as it is meant to be."""

    def test_is_answered(self):
        infer = kserve_pb.ModelInferRequest(model_name="spark-stories")
        infer.parameters["max_tokens"].int64_param = 2
        infer.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"The")
        with Server("--admin-address", "127.0.0.1:0") as server:
            generation = server.generation
            models = model_grpc.ModelServiceStub(server.channel)
            kserve = kserve_grpc.GRPCInferenceServiceStub(server.channel)
            admin = server.admin()

            def health(name, streamed):
                answer = method(server.channel, f"/grpc.health.v1.Health/{name}", lambda data: data,
                                lambda data: data, streamed)(b"")
                if streamed:
                    answer, stream = next(answer), answer
                    stream.cancel()
                self.assertEqual(answer, b"\x08\x01", "SERVING")

            calls = {
                "firesteel.v1.GenerationService": {
                    "Generate": lambda: generation.Generate(story(2)),
                    "GenerateStream": lambda: list(generation.GenerateStream(story(2))),
                    "Tokenize": lambda: generation.Tokenize(pb.TokenizeRequest(text="The")),
                    "Detokenize": lambda: generation.Detokenize(pb.DetokenizeRequest(token_ids=[5])),
                    "Score": lambda: generation.Score(pb.ScoreRequest(prompt="The cat"))},
                "firesteel.v1.ModelService": {
                    "ListModels": lambda: models.ListModels(model_pb.ListModelsRequest()),
                    "GetModel": lambda: models.GetModel(model_pb.GetModelRequest()),
                    "GetServerInfo": lambda: models.GetServerInfo(model_pb.GetServerInfoRequest()),
                    "GetLoad": lambda: models.GetLoad(model_pb.GetLoadRequest())},
                "firesteel.v1.AdminService": {
                    "LoadModel": lambda: admin.LoadModel(
                        admin_pb.LoadModelRequest(name="second", path=str(MODEL))),
                    "ReloadModel": lambda: admin.ReloadModel(admin_pb.ReloadModelRequest(name="second")),
                    "UnloadModel": lambda: admin.UnloadModel(admin_pb.UnloadModelRequest(name="second"))},
                "inference.GRPCInferenceService": {
                    "ServerLive": lambda: kserve.ServerLive(kserve_pb.ServerLiveRequest()),
                    "ServerReady": lambda: kserve.ServerReady(kserve_pb.ServerReadyRequest()),
                    "ModelReady": lambda: kserve.ModelReady(
                        kserve_pb.ModelReadyRequest(name="spark-stories")),
                    "ServerMetadata": lambda: kserve.ServerMetadata(kserve_pb.ServerMetadataRequest()),
                    "ModelMetadata": lambda: kserve.ModelMetadata(
                        kserve_pb.ModelMetadataRequest(name="spark-stories")),
                    "ModelInfer": lambda: kserve.ModelInfer(infer),
                    "ModelStreamInfer": lambda: list(kserve.ModelStreamInfer(iter([infer])))},
                "grpc.health.v1.Health": {"Check": lambda: health("Check", False),
                                          "Watch": lambda: health("Watch", True)},
            }
            described = {f"{file.package}.{service.name}": {rpc.name for rpc in service.method}
                         for file in descriptor_set().file for service in file.service}
            self.assertEqual({name: set(methods) for name, methods in calls.items()}, described)
            for service, methods in calls.items():
                for name, call in methods.items():
                    with self.subTest(f"{service}/{name}"):
                        call()


def descriptor_set():
    """The set that the build makes."""
    return descriptor_pb2.FileDescriptorSet.FromString(
        pathlib.Path(os.environ["FIRESTEEL_PROTOSET"]).read_bytes())


class Descriptors(unittest.TestCase):
    """The descriptor set that the build makes is all that a transcoding proxy needs."""

    def test_every_method_has_its_path(self):
        files = descriptor_set().file
        services = {f"{file.package}.{service.name}": service
                    for file in files for service in file.service}
        self.assertLessEqual({"firesteel.v1.GenerationService", "firesteel.v1.ModelService",
                              "firesteel.v1.AdminService", "inference.GRPCInferenceService",
                              "grpc.health.v1.Health"}, services.keys())
        messages = {f".{file.package}.{message.name}": message
                    for file in files for message in file.message_type}
        rules = {}
        for name in ("GenerationService", "ModelService"):
            for rpc in services[f"firesteel.v1.{name}"].method:
                rule = rpc.options.Extensions[annotations_pb2.http]
                verb = rule.WhichOneof("pattern")
                self.assertIsNotNone(verb, rpc.name)
                path = getattr(rule, verb)
                rules[rpc.name] = (verb, path, rule.body)
                fields = {field.name for field in messages[rpc.input_type].field}
                for variable in re.findall(r"{(\w+)", path):
                    self.assertIn(variable, fields, f"{rpc.name}: {path}")
        # What clients of the proxy call: it changes with the version only.
        self.assertEqual(rules, {
            "Generate": ("post", "/v1/generate", "*"),
            "GenerateStream": ("post", "/v1/generate:stream", "*"),
            "Tokenize": ("post", "/v1/tokenize", "*"),
            "Detokenize": ("post", "/v1/detokenize", "*"),
            "Score": ("post", "/v1/score", "*"),
            "ListModels": ("get", "/v1/models", ""),
            "GetModel": ("get", "/v1/models/{model=**}", ""),  # names may have slashes
            "GetServerInfo": ("get", "/v1/server", ""),
            "GetLoad": ("get", "/v1/load", ""),
        })
        # Operators' methods are nobody's REST.
        for rpc in services["firesteel.v1.AdminService"].method:
            self.assertFalse(rpc.options.HasExtension(annotations_pb2.http))


class Tls(unittest.TestCase):

    def test_streams_over_mutual_tls(self):
        folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        subprocess.run([ROOT / "server/foreign/make_certificates.sh", folder, "py"], check=True)
        with Server("--tls-cert", str(folder / "server.pem"), "--tls-key", str(folder / "server.key"),
                    "--tls-client-ca", str(folder / "ca.pem")) as server:
            read = lambda name: (folder / name).read_bytes()  # noqa: E731
            with grpc.secure_channel(server.address, grpc.ssl_channel_credentials(
                    read("ca.pem"), read("client.key"), read("client.pem"))) as channel:
                messages = list(pb_grpc.GenerationServiceStub(channel).GenerateStream(story()))
            self.assertEqual(messages[-1].usage.generated_tokens, 12)
            with grpc.secure_channel(server.address, grpc.ssl_channel_credentials(
                    read("ca.pem"))) as channel:
                error = error_of(lambda: pb_grpc.GenerationServiceStub(channel).Generate(story()))
            self.assertEqual(error.code(), grpc.StatusCode.UNAVAILABLE)


if __name__ == "__main__":
    unittest.main(verbosity=2)
