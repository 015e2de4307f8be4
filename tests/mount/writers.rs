//! Writers beside readers whose files are pushed: what was written is there, in what the kernel keeps and in the fork.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use rustix::fs::{FallocateFlags, copy_file_range, fallocate};

use crate::common::{Random, TestMount, TestStore};

const FOLDERS: usize = 24;
const FILES: usize = 24;
const WRITERS: usize = 2;
const LARGEST: u64 = 24_000;
/// Rounds, each with a new fork, unless `FORKVOL_WRITERS` says how many.
const ROUNDS: u64 = 12;

/// What one file is to hold.
struct Expected {
    path: PathBuf,
    bytes: Vec<u8>,
}

fn bytes(random: &mut Random, size: u64) -> Vec<u8> {
    (0..size).map(|_| 1 + random.next(255) as u8).collect()
}

fn path(folder: usize, file: usize) -> PathBuf {
    format!("d{folder}/f{file}").into()
}

/// Stores bytes through mappings. It is a process of its own: one that waits for a page of a mapping cannot change its memory
/// meanwhile, which whoever answers may have to.
struct Mapper(Child);

const MAPPER: &str = "
import mmap, sys
for line in sys.stdin:
    path, at, new = line.rstrip('\\n').split('\\t')
    at, new = int(at), bytes.fromhex(new)
    with open(path, 'r+b') as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[at : at + len(new)] = new
    print(flush=True)
";

impl Mapper {
    fn start() -> Mapper {
        let mut python = Command::new("python3");
        let pipes = python.stdin(Stdio::piped()).stdout(Stdio::piped());
        Mapper(pipes.args(["-c", MAPPER]).spawn().unwrap())
    }

    fn store(&mut self, path: &Path, at: u64, bytes: &[u8]) {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let path = path.to_str().unwrap();
        writeln!(self.0.stdin.as_mut().unwrap(), "{path}\t{at}\t{hex}").unwrap();
        let answer = &mut [0];
        self.0.stdout.as_mut().unwrap().read_exact(answer).unwrap();
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

fn overwrite(held: &mut Vec<u8>, at: u64, new: &[u8]) {
    let end = at as usize + new.len();
    held.resize(held.len().max(end), 0);
    held[at as usize..end].copy_from_slice(new);
}

/// Changes a file in one of the ways there are.
fn change(root: &Path, expected: &mut Expected, random: &mut Random, mapper: &mut Mapper) {
    let path = root.join(&expected.path);
    let open = || {
        let mut options = File::options();
        options.read(true).write(true).open(&path).unwrap()
    };
    let held = &mut expected.bytes;
    let len = held.len() as u64;
    let at = random.next(len.max(1));
    let size = 1 + random.next(5000);
    let new = bytes(random, size);
    match random.next(8) {
        0 => {
            *held = new;
            fs::write(&path, held).unwrap();
        }
        1 => {
            held.truncate(at as usize);
            open().set_len(at).unwrap();
        }
        2 => {
            held.resize((len + at) as usize, 0);
            open().set_len(len + at).unwrap();
        }
        3 => {
            open().write_all_at(&new, len).unwrap();
            held.extend(new);
        }
        4 => {
            let end = (at as usize + new.len()).min(held.len());
            held[at as usize..end].fill(0);
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(open(), punch, at, new.len() as u64).unwrap();
        }
        5 => {
            let (from, mut file) = (tempfile::tempfile_in(root).unwrap(), open());
            from.write_all_at(&new, 0).unwrap();
            let (mut from_at, mut to_at) = (0, at);
            let done = copy_file_range(
                &from,
                Some(&mut from_at),
                &mut file,
                Some(&mut to_at),
                new.len(),
            );
            overwrite(held, at, &new[..done.unwrap()]);
        }
        6 if len > 0 => {
            let new = &new[..new.len().min((len - at) as usize)];
            mapper.store(&path, at, new);
            overwrite(held, at, new);
        }
        _ => {
            open().write_all_at(&new, at).unwrap();
            overwrite(held, at, &new);
        }
    }
}

/// Lists a folder and reads its files from the first one on, so that others are pushed.
fn read_folder(root: &Path, folder: usize) {
    let entries = fs::read_dir(root.join(format!("d{folder}"))).unwrap();
    let paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    for path in paths {
        assert!(path.metadata().unwrap().is_file());
        fs::read(path).unwrap();
    }
}

/// How many files do not hold what they should.
fn wrong(mount: &TestMount, files: &[Expected]) -> Vec<String> {
    let look = |file: &Expected| {
        let found = fs::read(mount.path.join(&file.path)).unwrap();
        let differ = found.len().max(file.bytes.len());
        let at = (0..differ).find(|at| found.get(*at) != file.bytes.get(*at))?;
        let (len, wanted) = (found.len(), file.bytes.len());
        Some(format!(
            "{}: at {at} of {wanted}, {len} long",
            file.path.display()
        ))
    };
    files.iter().filter_map(look).collect()
}

#[test]
fn what_is_written_is_kept_and_shown_whatever_is_pushed_meanwhile() {
    let seed = 1 + u64::from(std::process::id());
    println!("seed {seed}");
    let mut random = Random(seed);
    let rounds = std::env::var("FORKVOL_WRITERS").map_or(ROUNDS, |n| n.parse().unwrap());
    let store = TestStore::new();
    let mount = store.fork("v");
    let mut base = Vec::new();
    for folder in 0..FOLDERS {
        fs::create_dir(mount.path.join(format!("d{folder}"))).unwrap();
        for file in 0..FILES {
            let size = 1 + random.next(LARGEST);
            let (path, bytes) = (path(folder, file), bytes(&mut random, size));
            fs::write(mount.path.join(&path), &bytes).unwrap();
            base.push((path, bytes));
        }
    }
    store.commit(mount);
    let mut mappers = [(); WRITERS].map(|()| Mapper::start());
    let (pushed, changed) = (AtomicU64::new(0), AtomicUsize::new(0));
    for round in 0..rounds {
        let mount = store.fork("v");
        let is_over = AtomicBool::new(false);
        // Where the reader is: writers are there too, a little ahead.
        let place = AtomicUsize::new(0);
        let mut owned: Vec<Vec<Expected>> = (0..WRITERS).map(|_| Vec::new()).collect();
        for (at, (path, bytes)) in base.iter().enumerate() {
            owned[at % WRITERS].push(Expected {
                path: path.clone(),
                bytes: bytes.clone(),
            });
        }
        thread::scope(|scope| {
            for (writer, (files, mapper)) in owned.iter_mut().zip(&mut mappers).enumerate() {
                let (mount, place, is_over, changed) = (&mount, &place, &is_over, &changed);
                let mut random = Random(seed + 7 * round + writer as u64);
                scope.spawn(move || {
                    while !is_over.load(Ordering::Relaxed) {
                        let each = FILES / WRITERS;
                        let folder = place.load(Ordering::Relaxed) % FOLDERS;
                        let file = folder * each + random.next(each as u64) as usize;
                        change(&mount.path, &mut files[file], &mut random, mapper);
                        changed.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for folder in 0..FOLDERS {
                place.store(folder, Ordering::Relaxed);
                read_folder(&mount.path, folder);
            }
            is_over.store(true, Ordering::Relaxed);
        });
        for files in &owned {
            assert_eq!(
                wrong(&mount, files),
                [""; 0],
                "round {round}: what the kernel keeps"
            );
        }
        let fork = store.engine.find_fork(&mount.id.to_string()).unwrap();
        pushed.fetch_add(
            fork.requests.get("store").copied().unwrap_or_default(),
            Ordering::Relaxed,
        );
        let id = mount.id;
        drop(mount);
        store.wait_unmounted(id);
        let mount = store.mount(id);
        for files in &owned {
            assert_eq!(
                wrong(&mount, files),
                [""; 0],
                "round {round}: what the fork holds"
            );
        }
        drop(mount);
        store.wait_unmounted(id);
        store.engine.abandon(id).unwrap();
    }
    println!("{pushed:?} pushed, {changed:?} changes");
    assert!(pushed.into_inner() > 0);
}
