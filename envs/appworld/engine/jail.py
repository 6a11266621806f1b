"""Takes away from this process what code written by a language model must not have; see docs/appworld-confinement.md.

Linux only, standard library only. Each layer is tried on its own and works without the others, so that an old kernel
or a container that forbids one keeps the rest; `confine` tells which are in force. Call it with one thread alive: its
layers hold for the caller and for the threads that it starts.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterable
from pathlib import Path

__all__ = ["confine", "die_with_parent", "drop_user"]

MEMORY_BYTES = 2 << 30
"""Address space; the engine itself takes about 0.4 GB."""
CPU_S = 900
FILE_BYTES = 64 << 20
OPEN_FILES = 256
THREADS = 64

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
_CAP_DAC_READ_SEARCH = 1 << 2
_MACHINE = platform.machine()


def die_with_parent(parent: int) -> None:
    """Be killed when the parent dies. Forgotten by the kernel at each change of the user: call again."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def confine(read: Iterable[Path], write: Iterable[Path], hide: Iterable[Path] = ()) -> dict[str, bool]:
    """Keep this process from other files, processes and hosts. Returns layer -> whether it is in force.

    Args:
        read: what may be read: files, or folders with all they hold.
        write: folders in which files may be made, changed and removed.
        hide: folders to cover where only namespaces are to be had.
    """
    _limit()
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    spaces = _namespaces(hide)
    return {"namespaces": spaces, "landlock": _landlock(read, write), "seccomp": _seccomp()}


def drop_user(folder: Path, uid: int, *, reads: bool) -> bool:
    """When root: give `folder` to user `uid`, who owns nothing else, and become that user. Returns whether it did.

    Args:
        reads: keep the right to read whatever files' permissions say, for this thread and those it starts.
    """
    parent = os.getppid()
    if os.geteuid() != 0:
        return False
    for path in (folder, *folder.rglob("*")):
        os.chown(path, uid, uid, follow_symlinks=False)
    _libc.prctl(_PR_SET_KEEPCAPS, int(reads), 0, 0, 0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    resource.setrlimit(resource.RLIMIT_NPROC, (THREADS, THREADS))
    os.setresuid(uid, uid, uid)
    if reads:
        _capabilities(_CAP_DAC_READ_SEARCH)
    die_with_parent(parent)
    return True


def _capabilities(only: int) -> None:
    """Give up all capabilities but these, for good: none can come back by running another program."""
    if _libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", only, only, 0, 0, 0, 0)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _limit() -> None:
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CPU: CPU_S,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


def _namespaces(hide: Iterable[Path]) -> bool:
    """A network without a single interface up, and mounts of its own in which `hide` is empty."""
    flags = _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWNET
    uid, gid, root = os.geteuid(), os.getegid(), os.geteuid() == 0
    if _libc.unshare(flags if root else flags | _CLONE_NEWUSER) != 0:
        return False
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    for path in hide:
        _libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"size=4k,mode=0000")
    if not root:
        _capabilities(0)  # the new user namespace came with all
    return True


_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR, _REFER, _TRUNCATE, _IOCTL = 1 << 2, 1 << 3, 1 << 13, 1 << 14, 1 << 15
_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | _TRUNCATE
"""Write, truncate, remove and make files and folders: no links, sockets or devices."""


def _landlock(read: Iterable[Path], write: Iterable[Path]) -> bool:
    """Only these files, no TCP, no signals to others and none of their abstract sockets."""
    version = _libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    files = (1 << 13) - 1
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL)):
        files |= right if version >= since else 0
    attributes = struct.pack("=QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _libc.syscall(_LANDLOCK_CREATE, attributes, size, 0)
    if ruleset < 0:
        return False
    try:
        allowed = [(path, _READ_FILE | _READ_DIR) for path in read]
        allowed += [(path, _READ_FILE | _READ_DIR | _WRITE & files) for path in write]
        for path, rights in allowed:
            _allow(ruleset, path, rights)
        return bool(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not path.is_dir():
        rights &= ~_READ_DIR
    _libc.syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
    os.close(fd)


# name -> (x86_64, aarch64); None: the call does not exist there.
_CALLS: dict[str, tuple[int | None, int]] = {
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, -1), "vfork": (58, -1), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "kill": (62, 129),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "mknod": (133, -1), "mknodat": (259, 33), "open_by_handle_at": (304, 265),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "personality": (135, 92), "setpriority": (141, 140),
}  # fmt: skip
_CLONE, _CLONE3, _TGKILL, _PRLIMIT = (56, 220), 435, (234, 131), (302, 261)
_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050000, 1, 38
_X32, _CLONE_THREAD = 0x40000000, 0x10000


def _program(own_pid: int) -> bytes:
    """A filter that refuses `_CALLS`, new processes, and signals to and limits on other processes."""
    column, arch = _ARCH[_MACHINE]
    deny = (_RETURN, 0, 0, _ERRNO | _EPERM)
    allow = (_RETURN, 0, 0, _ALLOW)
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, arch), deny, (_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, _X32), deny]
    for numbers in _CALLS.values():
        if (number := numbers[column]) is not None and number >= 0:
            code += [(_EQUAL, 0, 1, number), deny]
    code += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]  # libraries fall back to clone
    code += [(_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, 16), (_ANY_BIT, 1, 0, _CLONE_THREAD), deny, allow]
    for call, process in ((_TGKILL, own_pid), (_PRLIMIT, 0)):
        code += [(_EQUAL, 0, 4, call[column]), (_LOAD, 0, 0, 16), (_EQUAL, 1, 0, process), deny, allow]
    return b"".join(struct.pack("HBBI", *line) for line in [*code, allow])


def _seccomp() -> bool:
    if _MACHINE not in _ARCH:
        return False
    program = _program(os.getpid())
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    return bool(_libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0) == 0)
