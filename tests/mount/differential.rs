//! The same random calls on a mount and on a folder of the host's filesystem: results, errnos and final trees are equal.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::common::{Random, TestStore, sh};

#[derive(Debug, Clone)]
enum Op {
    Write(PathBuf, u64, u8, usize),
    Read(PathBuf, u64, usize),
    Truncate(PathBuf, u64),
    Mkdir(PathBuf),
    Rmdir(PathBuf),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf),
    Link(PathBuf, PathBuf),
    Symlink(PathBuf, PathBuf),
    Chmod(PathBuf, u32),
    Create(PathBuf),
    List(PathBuf),
    Copy(PathBuf, PathBuf),
}

fn path(random: &mut Random) -> PathBuf {
    let depth = 1 + random.next(3);
    let name = |random: &mut Random| OsString::from_vec(vec![b'a' + random.next(4) as u8]);
    (0..depth).map(|_| name(random)).collect()
}

fn op(random: &mut Random) -> Op {
    let p = path(random);
    match random.next(20) {
        0..=5 => {
            let at = random.next(40_000);
            Op::Write(
                p,
                at,
                random.next(256) as u8,
                1 + random.next(9000) as usize,
            )
        }
        6 => Op::Read(p, random.next(50_000), 20_000),
        7 => Op::Truncate(p, random.next(60_000)),
        8..=9 => Op::Mkdir(p),
        10 => Op::Rmdir(p),
        11..=12 => Op::Unlink(p),
        13 => Op::Rename(p, path(random)),
        14 => Op::Link(p, path(random)),
        15 => Op::Symlink(p, path(random)),
        16 => Op::Chmod(p, random.next(0o1000) as u32 | 0o700),
        17 => Op::Create(p),
        18 => Op::Copy(p, path(random)),
        _ => Op::List(p),
    }
}

/// What a call came to, in a form that both filesystems can be asked to agree on.
fn run(root: &Path, op: &Op) -> Result<Vec<u8>, i32> {
    let at = |p: &PathBuf| root.join(p);
    let open = |p: &PathBuf| File::options().read(true).write(true).open(at(p));
    let result: io::Result<Vec<u8>> = match op {
        Op::Write(p, offset, byte, len) => open(p)
            .and_then(|f| f.write_all_at(&vec![*byte; *len], *offset))
            .map(|()| vec![]),
        Op::Read(p, offset, len) => open(p).and_then(|f| {
            let mut bytes = vec![0; *len];
            let n = f.read_at(&mut bytes, *offset)?;
            bytes.truncate(n);
            Ok(bytes)
        }),
        Op::Truncate(p, size) => open(p).and_then(|f| f.set_len(*size)).map(|()| vec![]),
        Op::Mkdir(p) => fs::create_dir(at(p)).map(|()| vec![]),
        Op::Rmdir(p) => fs::remove_dir(at(p)).map(|()| vec![]),
        Op::Unlink(p) => fs::remove_file(at(p)).map(|()| vec![]),
        Op::Rename(a, b) => fs::rename(at(a), at(b)).map(|()| vec![]),
        Op::Link(a, b) => fs::hard_link(at(a), at(b)).map(|()| vec![]),
        Op::Symlink(a, b) => std::os::unix::fs::symlink(a, at(b)).map(|()| vec![]),
        Op::Chmod(p, mode) => {
            fs::set_permissions(at(p), fs::Permissions::from_mode(*mode)).map(|()| vec![])
        }
        Op::Create(p) => File::options()
            .write(true)
            .create_new(true)
            .open(at(p))
            .map(|_| vec![]),
        Op::Copy(a, b) => fs::copy(at(a), at(b)).map(|n| n.to_le_bytes().to_vec()),
        Op::List(p) => fs::read_dir(at(p)).map(|entries| {
            let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_vec()).collect();
            names.sort();
            names.concat()
        }),
    };
    result.map_err(|e| e.raw_os_error().unwrap_or(-1))
}

const TREE: &str = r#"find . -printf '%P %y %m %n %l ' \( -type f -printf '%s' -o -printf '' \) -printf '\n' | sort
find . -type f -print0 | sort -z | xargs -0r sha256sum"#;

fn rounds(seed: u64, steps: usize) {
    let mut random = Random(seed);
    let store = TestStore::new();
    let host = tempfile::tempdir().unwrap();
    let mut mount = store.fork("v");
    fs::set_permissions(
        host.path(),
        fs::metadata(&mount.path).unwrap().permissions(),
    )
    .unwrap();
    for step in 0..steps {
        let op = op(&mut random);
        let (ours, theirs) = (run(&mount.path, &op), run(host.path(), &op));
        assert!(
            ours == theirs,
            "seed {seed}, step {step}: {op:?}: {:?} on the fork, {:?} on the host",
            ours.map(|b| b.len()),
            theirs.map(|b| b.len())
        );
        match random.next(300) {
            0 => {
                store.commit(mount);
                mount = store.fork("v");
            }
            1 => drop(store.commit_as(&mount, true)),
            2 => {
                let id = mount.id;
                drop(mount);
                while store.engine.find_fork(&id.to_string()).unwrap().state != "unmounted" {
                    std::thread::yield_now();
                }
                mount = store.mount(id);
            }
            _ => {}
        }
        if step % 500 == 499 {
            assert_eq!(
                sh(&mount.path, TREE),
                sh(host.path(), TREE),
                "seed {seed}, step {step}"
            );
        }
    }
    assert_eq!(sh(&mount.path, TREE), sh(host.path(), TREE), "seed {seed}");
    let inode = fs::metadata(&mount.path).unwrap().ino();
    assert_eq!(inode, 1);
    store.commit(mount);
    store.check();
}

#[test]
fn random_calls_come_to_the_same_as_on_the_hosts_filesystem() {
    for seed in [1, 2, 3, 0xf0f0_1234, 987_654_321] {
        rounds(seed, 3000);
    }
}
