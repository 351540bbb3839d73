"""The process in which a student's file runs. It imports nothing of minipaged; minipaged imports its wire format.

It is started with ``python -I -S``, gets inputs over one pipe, and sends answers over another. What it says is never
trusted: the grader, in its own process, compares. So there is nothing to be gained by patching functions, reading
frames or leaving early; what `fence` forbids is reading the engine's source, and harming the machine.

A frame is two lengths of four bytes (JSON, then raw bytes of tensors), and then both.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

MAX_JSON = 1 << 20  # bytes
MAX_RAW = 1 << 26
HEADER = struct.Struct(">II")
PACKAGES = ("minipaged", "visualizer")  # what a student's file may not import

Say = Callable[[Any], None]


class ProtocolError(Exception):
    """What came over the pipe is no answer."""


# --- the wire format, used by both sides --------------------------------------------------------------------------


def pack(message: Any) -> bytes:
    """A frame. `ProtocolError` for what is neither plain data (in lists, tuples, dicts) nor a tensor, or too large."""
    raw: list[bytes] = []
    text = json.dumps(_plain(message, raw), allow_nan=False).encode()
    size = sum(map(len, raw))
    if len(text) > MAX_JSON or size > MAX_RAW:
        raise ProtocolError(f"the answer is too large: {len(text)} bytes of text, {size} bytes of tensors")
    return b"".join([HEADER.pack(len(text), size), text, *raw])


def sizes(header: bytes) -> tuple[int, int]:
    text, raw = HEADER.unpack(header)
    if text > MAX_JSON or raw > MAX_RAW:
        raise ProtocolError("the answer is too large")
    return text, raw


def unpack(text: bytes, raw: bytes) -> Any:
    """The inverse of `pack`: tuples have become lists."""
    try:
        return _rich(json.loads(text, parse_constant=_no_constant), memoryview(raw))
    except (ValueError, RecursionError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ProtocolError(f"not an answer: {error}") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _plain(value: Any, raw: list[bytes], depth: int = 0) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        # JSON knows neither; a kernel's test may want to see them.
        return value if value - value == 0 else {"$float": str(value)}
    if depth < 20 and isinstance(value, (list, tuple)):
        return [_plain(item, raw, depth + 1) for item in value]
    if depth < 20 and isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _plain(item, raw, depth + 1) for key, item in value.items()}
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        start = sum(map(len, raw))
        raw.append(data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b"")
        return {"$tensor": str(data.dtype).removeprefix("torch."), "shape": list(data.shape), "at": start}
    raise ProtocolError(f"a {type(value).__name__} cannot be handed over; plain numbers, text, lists and tensors can")


def _rich(value: Any, raw: memoryview) -> Any:
    if isinstance(value, list):
        return [_rich(item, raw) for item in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$tensor" not in value:
        return {key: _rich(item, raw) for key, item in value.items()}
    import torch

    dtype, shape, at = getattr(torch, value["$tensor"]), value["shape"], value["at"]
    count = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_RAW:
            raise ValueError(f"no shape: {shape}")
        count *= size
    if not count:
        return torch.empty(shape, dtype=dtype)
    part = bytearray(raw[at : at + min(count * dtype.itemsize, MAX_RAW)])
    return torch.frombuffer(part, dtype=dtype).reshape(shape)


# --- the fence ----------------------------------------------------------------------------------------------------

FORBIDDEN = frozenset(
    "os.system os.exec os.posix_spawn os.spawn os.fork os.forkpty pty.spawn subprocess.Popen os.kill os.killpg "
    "signal.pthread_kill os.link os.symlink os.rename os.remove os.rmdir os.mkdir os.chmod os.chown os.truncate "
    "os.chflags os.lockf os.putenv os.setxattr shutil.rmtree shutil.move shutil.copyfile shutil.chown "
    "socket.__new__ socket.connect socket.bind socket.getaddrinfo socket.gethostbyname socket.sethostname "
    "ctypes.dlopen ctypes.dlsym ctypes.dlsym/handle ctypes.cdata ctypes.cdata/buffer ctypes.string_at "
    "ctypes.wstring_at ctypes.call_function ctypes.addressof gc.get_objects gc.get_referrers gc.get_referents "
    "sys.addaudithook sys._current_frames cpython.run_interactivehook syslog.openlog resource.prlimit "
    "resource.setrlimit fcntl.fcntl fcntl.ioctl fcntl.flock fcntl.lockf sqlite3.connect os.utime".split()
)
AROUND = frozenset("ctypes _ctypes _dbm _gdbm _posixshmem readline".split())  # modules that ask no hook


def fence(directory: str, readable: list[str], forbidden: list[str], packages: tuple[str, ...] = PACKAGES) -> None:
    """From now on this process starts no other, writes only to ``directory``, and reads only there and below the
    ``readable`` folders, except for what is below ``forbidden`` ones.

    An audit hook cannot be taken back. Nothing a student patches changes what it does: it looks nothing up in a module,
    calls only functions in C, tells files by inode, so that links and detours lead nowhere, and keeps all that in its
    defaults, which are not within reach of who catches its exceptions. A fence for a classroom, not a wall: code of
    unknown people belongs in a container.
    """
    import posix

    (home,), (top,) = _places([directory]), _places(["/"])

    def hook(
        event: str,
        args: tuple[Any, ...],
        *,
        home: tuple[int, int] = home,
        top: tuple[int, int] = top,
        roots: frozenset[tuple[int, int]] = frozenset([home, *_places(readable)]),
        secret: frozenset[tuple[int, int]] = frozenset(_inodes(forbidden)),
        writing: int = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND,
        stat: Any = posix.stat,
        lstat: Any = posix.lstat,
        rpartition: Any = str.rpartition,
        split: Any = str.split,
        kind: Any = type,
        is_a: Any = isinstance,
        number: Any = int,
        text: Any = str,
        raw: Any = bytes,
        decode: Any = bytes.decode,
        refused: Any = PermissionError,
        no_import: Any = ImportError,
        missing: Any = OSError,
        denied: frozenset[str] = FORBIDDEN,
        around: frozenset[str] = AROUND,
        packages: tuple[str, ...] = packages,
    ) -> None:
        if event in denied:
            raise refused(f"{event} is not allowed here")
        if event == "import":
            if split(args[0], ".", 1)[0] in packages:
                raise no_import("a lab is solved without importing minipaged")
            if args[0] in around:
                raise no_import(f"{args[0]} is not allowed here")
            return
        opens = event == "open"
        if not opens and event != "os.listdir" and event != "os.scandir":
            return
        name = "." if args[0] is None else args[0]
        if kind(name) is number:
            return  # open already
        if is_a(name, raw):
            name = decode(name, "utf-8", "surrogateescape")
        if not is_a(name, text):
            raise refused("only a name or a number opens a file here")
        if opens and name == "/dev/null":
            return
        writes = opens and (not is_a(args[2], number) or args[2] & writing)
        place = rpartition(name, "/")[0] or ("/" if name[:1] == "/" else ".") if opens else name
        status = stat(place)
        if writes and (status.st_ino, status.st_dev) != home:
            raise refused("this process may write to its own folder only")
        # Upwards from the folder, as the kernel walks: neither links nor detours change where one ends up.
        while (status.st_ino, status.st_dev) not in roots:
            if (status.st_ino, status.st_dev) == top:
                raise refused("this may not be opened here")
            place += "/.."
            status = stat(place)
        if not opens:
            return
        try:
            found = lstat(name) if writes else stat(name)
        except missing:
            return  # nothing there yet, or nothing to read
        if found.st_mode & 0o170000 != 0o100000 or (found.st_ino, found.st_dev) in secret:
            raise refused("this may not be opened here")

    sys.addaudithook(hook)


def _places(folders: list[str]) -> list[tuple[int, int]]:
    found = [os.stat(folder) for folder in folders if os.path.isdir(folder)]
    return [(status.st_ino, status.st_dev) for status in found]


def _inodes(folders: list[str]) -> list[tuple[int, int]]:
    found = []
    for top in folders:
        for folder, _, names in os.walk(top):
            for name in (".", *names):
                try:
                    status = os.stat(os.path.join(folder, name))
                except OSError:
                    continue
                found.append((status.st_ino, status.st_dev))
    return found


# By these a process starts others, signals them, reads their memory, reaches the network, makes devices, or gets round
# what is refused here: a system call and its numbers on x86-64 and on 64-bit ARM.
CALLS = """
clone 56 220, fork 57 -, vfork 58 -, clone3 435 435, execve 59 221, execveat 322 281, kill 62 129,
tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_open 434 434,
pidfd_send_signal 424 424, pidfd_getfd 438 438, ptrace 101 117, process_vm_readv 310 270,
process_vm_writev 311 271, socket 41 198, mknod 133 -, mknodat 259 33, chroot 161 51, unshare 272 97,
setns 308 268, io_uring_setup 425 425
"""
ARCHITECTURES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}  # how the kernel calls it; column of CALLS


def seal() -> None:
    """On Linux the kernel itself refuses `CALLS` from now on (seccomp). This binds root, too, whom limits do not, and
    code that no audit hook hears of. Where it cannot be done, the fence stands alone."""
    arch, column = ARCHITECTURES.get(os.uname().machine, (0, 0))
    if sys.platform != "linux" or not column:
        return
    numbers = [call.split()[column] for call in CALLS.split(",")]
    calls = [int(number) for number in numbers if number != "-"]
    had = set(sys.modules)  # whoever came with ctypes may keep it
    import ctypes

    # A filter in the kernel's small language: other architectures and x32 are refused, then each number compared.
    allow, refuse, load, equal, at_least = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x20, 0x15, 0x35
    size = len(calls)
    code = [(load, 0, 0, 4), (equal, 0, size + 3, arch), (load, 0, 0, 0), (at_least, size + 1, 0, 0x40000000)]
    code += [(equal, size - number, 0, call) for number, call in enumerate(calls)]
    code += [(0x06, 0, 0, allow), (0x06, 0, 0, refuse)]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(text))
    prctl = ctypes.CDLL(None).prctl
    prctl(38, 1, 0, 0, 0)  # no new privileges, the condition for the next
    prctl(22, 2, ctypes.c_char_p(program), 0, 0)
    for name in set(sys.modules) - had:
        del sys.modules[name]


class Blocker:
    """First on ``sys.meta_path``: minipaged is not there to be imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"a lab is solved without importing {name}", name=name)


def limit(limits: dict[str, int]) -> None:
    """``RLIMIT_…`` name → value, soft and hard. What a system does not know or allow is left out."""
    import resource

    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            continue


# --- the student's side of the conversation -----------------------------------------------------------------------


class Remote:
    """Stands in the student's process for an object of the grader's: calls go over the pipe."""

    def __init__(self, ask: Callable[..., Any], name: str, methods: list[str], attributes: list[str]) -> None:
        self.__dict__.update(_ask=ask, _name=name, _methods=methods, _attributes=attributes)

    def __getattr__(self, attribute: str) -> Any:
        if attribute in self._methods:
            return lambda *args: self._ask([self._name, attribute, list(args)])
        if attribute in self._attributes:
            return self._ask([self._name, attribute, None])
        raise AttributeError(f"the {self._name} has no {attribute!r}")

    def __setattr__(self, attribute: str, value: Any) -> None:
        raise AttributeError(f"the {self._name} is not yours to change")


class Server:
    """Obeys requests, one after the other, until the pipe is closed."""

    def __init__(self, requests: int, answers: int, path: str) -> None:
        self._in, self._out, self._path = requests, answers, path
        self._buffer = bytearray()
        self._objects: list[Any] = []
        self._names: dict[str, Any] = {}

    def load(self) -> None:
        with open(self._path, encoding="utf-8") as file:
            source = file.read()
        from types import ModuleType

        module = ModuleType(os.path.basename(self._path).removesuffix(".py"))
        module.__file__ = self._path
        sys.modules[module.__name__] = module
        self._names = module.__dict__
        exec(compile(source, self._path, "exec"), self._names)

    def run(self) -> None:
        self._answer(self.load)
        while (request := self._read()) is not None:
            self._answer(partial(self._obey, request))

    def _answer(self, action: Callable[[], Any]) -> None:
        try:
            frame = pack({"ok": action()})
        except BaseException as error:  # SystemExit too: to leave is no answer
            frame = pack({"error": _told(error, self._path)})
        self._write(frame)

    def _obey(self, request: dict[str, Any]) -> Any:
        args = [self._received(arg) for arg in request.get("args", [])]
        name = request["name"]
        if request["do"] == "new":
            self._objects.append(self._named(name)(*args))
            return len(self._objects) - 1
        if request["do"] == "function":
            return self._named(name)(*args)
        thing = getattr(self._objects[request["object"]], name)
        return thing(*args) if request["do"] == "call" else thing

    def _named(self, name: str) -> Any:
        if name not in self._names:
            raise NameError(f"your file has no {name}")
        return self._names[name]

    def _received(self, value: Any) -> Any:
        if isinstance(value, dict) and "$remote" in value:
            return Remote(self._ask, value["$remote"], value["methods"], value["attributes"])
        if isinstance(value, dict) and "$object" in value:
            return self._objects[value["$object"]]
        return value

    def _ask(self, callback: list[Any]) -> Any:
        self._write(pack({"callback": callback}))
        answer = self._read()
        if answer is None:
            raise SystemExit
        if "error" not in answer:
            return answer["ok"]
        kind, message = answer["error"]
        cls = self._names.get(kind, getattr(__import__("builtins"), kind, RuntimeError))
        raise cls(message)

    def _read(self) -> Any:
        header = self._exactly(HEADER.size)
        if len(header) < HEADER.size:
            return None
        text, raw = sizes(header)
        return unpack(self._exactly(text), self._exactly(raw))

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size and (part := os.read(self._in, 1 << 16)):
            self._buffer += part
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _write(self, frame: bytes) -> None:
        view = memoryview(frame)
        while view:
            view = view[os.write(self._out, view) :]


def _told(error: BaseException, path: str) -> dict[str, Any]:
    """An error in words: its classes, its text, and the student's line that it comes from."""
    message, place = str(error), ""
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        message = "it printed or wrote more than a megabyte"
    if isinstance(error, SystemExit):
        message = "it left with exit() instead of returning"
    if isinstance(error, SyntaxError) and error.filename == path:
        message, place = str(error.msg), f"{os.path.basename(path)}, line {error.lineno}"
    where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return {
        "type": type(error).__name__,
        "classes": [cls.__name__ for cls in type(error).__mro__],
        "message": message[:1000],
        "where": f"{os.path.basename(path)}, line {where[-1].lineno}, in {where[-1].name}" if where else place,
        "ours": isinstance(error, ProtocolError),
    }


def main() -> None:
    settings = json.loads(sys.argv[1])
    sys.argv[1:] = []
    processor = settings["limits"].pop("RLIMIT_CPU", None)
    limit(settings["limits"])
    sys.path[:0] = settings["paths"]
    for name in settings["preload"]:
        __import__(name)
    readable = list(sys.path)
    del sys.path[: len(settings["paths"])]
    if processor is not None:
        limit({"RLIMIT_CPU": processor + int(time.process_time())})  # to import packages is not the student's fault
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
    server = Server(settings["requests"], settings["answers"], settings["file"])
    seal()
    fence(os.getcwd(), readable, settings["forbidden"])
    server.run()


if __name__ == "__main__":
    main()
