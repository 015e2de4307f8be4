//! What `docs/semantics.md` says of single calls, through the kernel.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};

use rustix::fs::{CWD, FallocateFlags, FlockOperation, RenameFlags, fallocate, renameat_with};
use rustix::io::Errno;

use crate::common::{TestStore, sh};

/// > `rename` takes `NOREPLACE`, `EXCHANGE` and `WHITEOUT`.
#[test]
fn rename_takes_its_three_flags() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let at = |name: &str| mount.path.join(name);
    let rename = |from: &str, to: &str, flags| renameat_with(CWD, at(from), CWD, at(to), flags);
    let text = |name: &str| fs::read_to_string(at(name)).unwrap();
    fs::write(at("a"), "a").unwrap();
    fs::write(at("b"), "b").unwrap();
    let refused = rename("a", "b", RenameFlags::NOREPLACE).unwrap_err();
    assert_eq!(
        (refused, text("a"), text("b")),
        (Errno::EXIST, "a".into(), "b".into())
    );
    rename("a", "c", RenameFlags::NOREPLACE).unwrap();
    rename("b", "c", RenameFlags::EXCHANGE).unwrap();
    assert_eq!((text("b"), text("c")), ("a".into(), "b".into()));
    rename("b", "d", RenameFlags::WHITEOUT).unwrap();
    let left = fs::symlink_metadata(at("b")).unwrap();
    assert!(left.file_type().is_char_device() && left.rdev() == 0);
    assert_eq!(text("d"), "a");
}

#[test]
fn a_whiteout_gets_from_its_folder_what_any_device_gets() {
    let store = TestStore::new();
    let mount = store.fork_with("v", |request| request.acl = true);
    let at = |name: &str| mount.path.join(name);
    sh(
        &mount.path,
        "mkdir d; chgrp 77 d; chmod 2775 d; setfacl -d -m u:4242:rwx d; touch d/a",
    );
    renameat_with(CWD, at("d/a"), CWD, at("d/b"), RenameFlags::WHITEOUT).unwrap();
    let left = fs::symlink_metadata(at("d/a")).unwrap();
    assert!(left.file_type().is_char_device() && left.rdev() == 0);
    assert_eq!((left.gid(), left.mode() & 0o7777), (77, 0));
    let acl = sh(&mount.path, "getfacl -cE d/a");
    assert!(
        acl.contains("user:4242:rwx\n") && acl.contains("mask::---"),
        "{acl}"
    );
}

#[test]
fn an_attribute_that_is_to_be_both_there_and_not_is_never_set() {
    use rustix::fs::{XattrFlags, setxattr};
    let store = TestStore::new();
    let mount = store.fork("v");
    let both = XattrFlags::CREATE | XattrFlags::REPLACE;
    let set = |flags| setxattr(&mount.path, "user.k", b"v", flags);
    assert_eq!(set(both), Err(Errno::NODATA));
    set(XattrFlags::CREATE).unwrap();
    assert_eq!(set(both), Err(Errno::EXIST));
}

/// > `fallocate` takes allocation, `KEEP_SIZE`, `PUNCH_HOLE` and `ZERO_RANGE` and refuses the others with EOPNOTSUPP.
#[test]
fn fallocate_takes_four_modes_and_refuses_the_others() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let path = mount.path.join("f");
    fs::write(&path, vec![7; 100_000]).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let keep = FallocateFlags::KEEP_SIZE;
    let mut expected = vec![7; 100_000];
    for (flags, from, len, zeros, size) in [
        (FallocateFlags::empty(), 0, 120_000, 0..0, 120_000),
        (keep, 0, 200_000, 0..0, 120_000),
        (
            FallocateFlags::PUNCH_HOLE | keep,
            8_000,
            9_000,
            8_000..17_000,
            120_000,
        ),
        (
            FallocateFlags::ZERO_RANGE | keep,
            50_000,
            100_000,
            50_000..120_000,
            120_000,
        ),
        (
            FallocateFlags::ZERO_RANGE,
            110_000,
            20_000,
            110_000..130_000,
            130_000,
        ),
    ] {
        fallocate(&file, flags, from, len).unwrap();
        expected.resize(size, 0);
        expected[zeros].fill(0);
        assert!(fs::read(&path).unwrap() == expected, "{flags:?}");
    }
    for flags in [
        FallocateFlags::COLLAPSE_RANGE,
        FallocateFlags::INSERT_RANGE,
        FallocateFlags::UNSHARE_RANGE,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE | keep,
    ] {
        let refused = fallocate(&file, flags, 4096, 4096).unwrap_err();
        assert_eq!(refused, Errno::OPNOTSUPP, "{flags:?}");
    }
    assert!(fs::read(&path).unwrap() == expected);
}

/// > Advisory locks do, by the kernel.
#[test]
fn a_lock_of_one_keeps_others_out() {
    let store = TestStore::new();
    let mount = store.fork("v");
    fs::write(mount.path.join("f"), "x").unwrap();
    let open = || {
        File::options()
            .write(true)
            .open(mount.path.join("f"))
            .unwrap()
    };
    let (one, other) = (open(), open());
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    rustix::fs::flock(&one, exclusive).unwrap();
    assert_eq!(
        rustix::fs::flock(&other, exclusive).unwrap_err(),
        Errno::WOULDBLOCK
    );
    drop(one);
    rustix::fs::flock(&other, exclusive).unwrap();
    // Those of fcntl are of a process.
    let another = || {
        let script = "import fcntl\ntry:\n fcntl.lockf(open('f', 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB); print('taken')\n\
                      except BlockingIOError: print('kept out')";
        sh(&mount.path, &format!("python3 -c \"{script}\""))
    };
    rustix::fs::fcntl_lock(&other, exclusive).unwrap();
    assert_eq!(another(), "kept out\n");
    rustix::fs::fcntl_lock(&other, FlockOperation::Unlock).unwrap();
    assert_eq!(another(), "taken\n");
}

/// > `O_DIRECT`, shared and private `mmap` work.
#[test]
fn maps_and_direct_reads_and_writes_see_each_other() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let script = r#"
import mmap, os
fd = os.open('f', os.O_RDWR | os.O_CREAT)
os.pwrite(fd, b'a' * 20000, 0)
shared = mmap.mmap(fd, 20000)
private = mmap.mmap(fd, 20000, access=mmap.ACCESS_COPY)
shared[5000:5003] = b'new'
assert os.pread(fd, 5, 4999) == b'anewa'
private[9000:9003] = b'own'
assert os.pread(fd, 3, 9000) == b'aaa' and private[9000:9003] == b'own' and private[5000:5003] == b'new'
os.pwrite(fd, b'written', 100)
assert shared[100:107] == b'written'
shared.flush()
direct = os.open('f', os.O_RDWR | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
page[:] = b'd' * 4096
assert os.pwritev(direct, [page], 8192) == 4096
assert os.preadv(direct, [page], 4096) == 4096 and page[904:907] == b'new'
assert shared[8192:12288] == b'd' * 4096 and os.pread(fd, 4097, 8192) == b'd' * 4096 + b'a'
"#;
    sh(&mount.path, &format!("python3 - <<'E'\n{script}\nE"));
    let before = fs::read(mount.path.join("f")).unwrap();
    store.commit(mount);
    assert!(fs::read(store.fork("v").path.join("f")).unwrap() == before);
}

/// Whether the kernel is of this version or later.
fn kernel_is(major: u32, minor: u32) -> bool {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap()) >= (major, minor)
}

/// > It holds every `write(2)` that had returned before it began, and every mapped store followed by `msync`, `munmap` or `exit` (on
/// > kernels before 6.16: by `msync` alone).
#[test]
fn a_commit_holds_what_was_written_and_what_was_stored_in_a_map_and_let_go() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let script = "import mmap, os, sys\nf = open('f', 'r+b'); m = mmap.mmap(f.fileno(), 0)\n\
                  for at in range(0, len(m), 4096): m[at:at + 4] = sys.argv[1].encode()[:4]\n\
                  os.pwrite(f.fileno(), b'x' + sys.argv[1].encode(), 100)\n\
                  if sys.argv[1] == 'sync': m.flush()\n\
                  if sys.argv[1] == 'unmap': m.close()\n\
                  if sys.argv[1] == 'exit': os._exit(0)\n\
                  print('done', flush=True); sys.stdin.read()\n";
    let ways = match kernel_is(6, 16) {
        true => &["sync", "unmap", "exit"][..],
        false => &["sync"],
    };
    for (way, number) in ways.iter().zip(1..) {
        fs::write(mount.path.join("f"), vec![0; 2 << 20]).unwrap();
        let mut program = Command::new("python3")
            .args(["-c", script, way])
            .current_dir(&mount.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        if *way == "exit" {
            program.wait().unwrap();
        } else {
            let mut said = String::new();
            let mut out = BufReader::new(program.stdout.take().unwrap());
            out.read_line(&mut said).unwrap();
            assert_eq!(said, "done\n", "{way}");
        }
        assert_eq!(store.commit_as(&mount, true), Some(number));
        let mut bytes = Vec::new();
        store
            .engine
            .cat(&format!("v@{number}"), b"f", &mut bytes)
            .unwrap();
        assert_eq!(bytes.len(), 2 << 20);
        let stored = &way.as_bytes()[..4];
        assert!(bytes.chunks(4096).all(|page| page[..4] == *stored), "{way}");
        assert_eq!(&bytes[100..101 + way.len()], format!("x{way}").as_bytes());
        drop(program.stdin.take());
        program.wait().unwrap();
    }
}

/// > Setting an ACL by somebody who is not a member of the file's group does not clear its setgid bit.
#[test]
fn an_acl_that_a_stranger_to_the_group_sets_leaves_the_setgid_bit() {
    let store = TestStore::new();
    let mount = store.fork_with("v", |request| request.acl = true);
    sh(
        &mount.path,
        "chmod 755 .; touch f; chown 65534:0 f; chmod 2755 f
         setpriv --reuid 65534 --regid 65534 --clear-groups setfacl -m u:4242:r f; getfacl f | grep user:4242:r--",
    );
    let mode = fs::metadata(mount.path.join("f"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7000, 0o2000);
}

/// > Reading changes no access time, so that reading makes no version.
#[test]
fn reading_through_the_kernel_makes_no_version() {
    let store = TestStore::new();
    let base = store.fork("v");
    sh(
        &base.path,
        "mkdir d; echo text >d/f; ln -s d/f l; touch -ad 2001-02-03 d d/f; touch -had 2001-02-03 l",
    );
    store.commit(base);
    let mount = store.fork("v");
    let times = "stat -c '%n %X' . d d/f l";
    let before = sh(&mount.path, times);
    sh(&mount.path, "cat l d/f; ls -R; readlink l; grep -r text .");
    assert_eq!(sh(&mount.path, times), before);
    assert_eq!(store.commit(mount), None);
}

/// What of the bytes is in the file of a version, which is to be some of them from the first on.
fn prefix(store: &TestStore, version: u64, bytes: &[u8]) -> usize {
    let mut found = Vec::new();
    store
        .engine
        .cat(&format!("v@{version}"), b"f", &mut found)
        .unwrap();
    assert!(
        bytes.starts_with(&found),
        "{} bytes of version {version}",
        found.len()
    );
    found.len()
}

/// > The kernel hands it on in requests of at most 1 MiB: a commit with `--keep` in its midst may hold a beginning, too.
#[test]
fn a_commit_amid_a_long_write_holds_a_prefix_of_it() {
    let store = TestStore::new();
    let mount = store.fork("v");
    let bytes: Vec<u8> = (0..12_u32 << 20).flat_map(u32::to_le_bytes).collect();
    loop {
        let mut file = File::create(mount.path.join("f")).unwrap();
        store.commit_as(&mount, true);
        let charged = || store.engine.find_fork(&mount.id.to_string()).unwrap().bytes;
        let (before, bytes) = (charged(), &bytes);
        let written = std::thread::scope(|scope| {
            let writer = scope.spawn(move || file.write(bytes).unwrap());
            while charged() == before {
                std::thread::yield_now();
            }
            let version = store.commit_as(&mount, true).unwrap();
            assert_eq!(writer.join().unwrap(), bytes.len());
            prefix(&store, version, bytes)
        });
        // The commit may have come late: then it held all.
        if written < bytes.len() {
            return;
        }
    }
}
