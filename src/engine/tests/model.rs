//! Random work in several forks of one volume, against a model that is nothing but maps: each fork shows its base and what was
//! done in it, and each version is exactly what its commit had before it.

use super::*;
use crate::fs::Allocate;

const FORKS: usize = 3;
const NAMES: u64 = 12;

/// What a file holds; names of one file share its number.
#[derive(Clone, Debug, Default, PartialEq)]
struct File {
    bytes: Vec<u8>,
    mode: u16,
    xattr: Option<Vec<u8>>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    names: BTreeMap<String, usize>,
    files: BTreeMap<usize, File>,
    next: usize,
}

impl Model {
    /// Each name with its file and how many names that has.
    fn shown(&self) -> BTreeMap<String, (File, u32)> {
        let links =
            |file: usize| self.names.values().filter(|other| **other == file).count() as u32;
        let shown = |(name, file): (&String, &usize)| {
            (name.clone(), (self.files[file].clone(), links(*file)))
        };
        self.names.iter().map(shown).collect()
    }
}

/// What a fork shows, in the same form.
fn shown(fs: &Fs) -> BTreeMap<String, (File, u32)> {
    let mut out = BTreeMap::new();
    fs.readdir(ROOT, 0, |entry| {
        let name = String::from_utf8(entry.name.to_vec()).unwrap();
        if name != "." && name != ".." {
            out.insert(name, entry.ino);
        }
        true
    })
    .unwrap();
    let of = |(name, ino): (String, Ino)| {
        let attr = fs.getattr(ino).unwrap();
        assert!(attr.blocks <= attr.size.div_ceil(4096) * 8, "{attr:?}");
        let file = File {
            bytes: fs.read(ino, 0, attr.size as usize).unwrap(),
            mode: attr.mode,
            xattr: fs.getxattr(ino, b"user.x").ok(),
        };
        (name, (file, attr.nlink))
    };
    out.into_iter().map(of).collect()
}

pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    fn name(&mut self) -> String {
        format!("n{}", self.below(NAMES))
    }

    /// Mostly small, sometimes of several chunks.
    fn size(&mut self) -> usize {
        let most = [600, 5_000, 40_000, 300_000][self.below(4) as usize];
        self.below(most) as usize
    }
}

/// Does one thing in a fork and in its model.
fn step(random: &mut Random, fs: &Fs, model: &mut Model) {
    let name = random.name();
    let at = |name: &str| {
        fs.lookup(ROOT, name.as_bytes())
            .unwrap()
            .map(|entry| entry.ino)
    };
    let Some(&file) = model.names.get(&name) else {
        assert_eq!(at(&name), None, "{name}");
        let new = NewNode::new(Kind::File, 0o644);
        fs.make(ME, ROOT, name.as_bytes(), new).unwrap();
        model.next += 1;
        model.names.insert(name, model.next);
        let made = File {
            mode: 0o644,
            ..File::default()
        };
        model.files.insert(model.next, made);
        return;
    };
    let ino = at(&name).unwrap();
    let held = model.files.get_mut(&file).unwrap();
    match random.below(10) {
        0..=3 => {
            let (offset, size) = (random.size(), random.size());
            let data = noise(size.max(1), random.below(1 << 40) + 1);
            fs.write(ME, ino, offset as u64, &data, false).unwrap();
            held.bytes
                .resize(held.bytes.len().max(offset + data.len()), 0);
            held.bytes[offset..offset + data.len()].copy_from_slice(&data);
        }
        4 => {
            let size = random.size();
            let set = SetAttr {
                size: Some(size as u64),
                ..SetAttr::default()
            };
            fs.setattr(ME, ino, set).unwrap();
            held.bytes.resize(size, 0);
        }
        5 => {
            let (offset, len) = (random.size(), random.size() + 1);
            fs.fallocate(ME, ino, offset as u64, len as u64, Allocate::Punch)
                .unwrap();
            let end = held.bytes.len().min(offset + len);
            if offset < end {
                held.bytes[offset..end].fill(0);
            }
        }
        6 => {
            let (mode, value) = (
                0o600 + random.below(64) as u16,
                noise(random.size() % 3_000 + 1, 5),
            );
            let set = SetAttr {
                mode: Some(mode),
                ..SetAttr::default()
            };
            fs.setattr(ME, ino, set).unwrap();
            fs.setxattr(ME, ino, b"user.x", &value, XattrMode::Any)
                .unwrap();
            (held.mode, held.xattr) = (mode, Some(value));
        }
        7 => {
            fs.unlink(ME, ROOT, name.as_bytes()).unwrap();
            model.names.remove(&name);
        }
        8 => {
            let to = random.name();
            if let Some(other) = model.names.get(&to).copied() {
                let pair = ((ROOT, name.as_bytes()), (ROOT, to.as_bytes()));
                let mode = [RenameMode::Replace, RenameMode::Exchange][random.below(2) as usize];
                fs.rename(ME, pair.0, pair.1, mode).unwrap();
                // Two names of one file: a rename does nothing.
                if mode == RenameMode::Exchange {
                    model.names.insert(name, other);
                    model.names.insert(to, file);
                } else if other != file {
                    model.names.remove(&name);
                    model.names.insert(to, file);
                }
            } else {
                fs.link(ME, ino, ROOT, to.as_bytes()).unwrap();
                model.names.insert(to, file);
            }
        }
        _ => {
            let to = random.name();
            if let Some(other) = model.names.get(&to).copied().filter(|other| *other != file) {
                let target = at(&to).unwrap();
                let len = held.bytes.len();
                let bytes = held.bytes.clone();
                let done = fs
                    .copy_range(ME, (ino, 0), (target, 0), len as u64)
                    .unwrap() as usize;
                let target = model.files.get_mut(&other).unwrap();
                target.bytes.resize(target.bytes.len().max(done), 0);
                target.bytes[..done].copy_from_slice(&bytes[..done]);
            }
        }
    }
}

fn run(seed: u64) {
    eprintln!("seed {seed}");
    let mut random = Random(seed);
    let mut bench = Bench::new();
    let mut versions: BTreeMap<u64, Model> = BTreeMap::new();
    let mut forks: Vec<(ForkId, Model)> = Vec::new();
    for _ in 0..220 {
        if forks.len() < FORKS {
            let id = bench.fork("v");
            let head = versions.last_key_value();
            forks.push((id, head.map(|(_, model)| model.clone()).unwrap_or_default()));
        }
        let at = random.below(forks.len() as u64) as usize;
        let (id, model) = &mut forks[at];
        let fs = bench.fs(*id);
        for _ in 0..random.below(12) {
            step(&mut random, &fs, model);
        }
        // No kernel holds anything: what has no name is gone.
        fs.fork.end_session(0);
        drop(fs);
        match random.below(12) {
            0 | 1 => {
                if let Some(number) = bench.commit(*id, true) {
                    versions.insert(number, model.clone());
                }
            }
            2 => {
                let (id, model) = forks.swap_remove(at);
                if let Some(number) = bench.commit(id, false) {
                    versions.insert(number, model);
                }
            }
            3 => {
                let (id, _) = forks.swap_remove(at);
                bench.engine().abandon(id).unwrap();
            }
            4 => {
                let live = bench.engine().live(*id).unwrap();
                bench.engine().move_to_private_root(&live).unwrap();
            }
            5 => bench.reopen(),
            6 => drop(bench.engine().gc(false).unwrap()),
            _ => {}
        }
        for (id, model) in &forks {
            assert_eq!(
                shown(&bench.fs(*id)),
                model.shown(),
                "fork {id}, seed {seed}"
            );
        }
    }
    for version in bench.engine().log("v").unwrap() {
        let id = bench.fork_with("v", |request| {
            request.from = Some(format!("v@{}", version.number));
        });
        let expected = versions[&version.number].shown();
        assert_eq!(
            shown(&bench.fs(id)),
            expected,
            "v@{}, seed {seed}",
            version.number
        );
        assert_eq!(
            version.files,
            expected_files(&versions[&version.number]),
            "v@{}",
            version.number
        );
        bench.engine().abandon(id).unwrap();
    }
    check(&bench);
}

/// The files with a name, and the root.
fn expected_files(model: &Model) -> u64 {
    let named: std::collections::BTreeSet<_> = model.names.values().collect();
    named.len() as u64 + 1
}

#[test]
fn forks_and_versions_are_what_a_model_of_maps_says() {
    for seed in [1, 0x5eed, 77_777] {
        run(seed);
    }
    // Another one each time; what fails is printed above.
    run(u64::from(std::process::id()) << 20 | 1);
}
