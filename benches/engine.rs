//! Forks, commits and operations on a fork without a mount, at growing sizes.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use forkvol::engine::{CommitRequest, Engine, EngineConfig, ForkRequest, Owner};
use forkvol::fs::{Caller, Fs, NewNode};
use forkvol::record::{Ino, Kind, ROOT};
use forkvol::store::{ForkId, Verdict};

fn fork(engine: &Arc<Engine>) -> ForkId {
    let request = ForkRequest {
        volume: "v".into(),
        from: None,
        parents: Vec::new(),
        read_only: false,
        ephemeral: false,
        size: 1 << 40,
        labels: BTreeMap::new(),
        excludes: Vec::new(),
        default_excludes: false,
        import: false,
        owner: Owner::Keep,
        acl: false,
        suid: false,
        dev: false,
        job: None,
        uid_map: None,
        verdict: Verdict::Off,
        scope: String::new(),
        uid: 0,
        gid: 0,
        asker: Weak::new(),
    };
    engine.fork(request).unwrap().id.parse().unwrap()
}

fn commit(engine: &Engine, id: ForkId) {
    let request = CommitRequest {
        keep: false,
        labels: BTreeMap::new(),
        message: None,
        if_head: None,
        if_base: false,
        force: false,
        when: BTreeMap::new(),
    };
    engine.commit(vec![id], request).unwrap();
}

fn make(fs: &Fs, from: u64, count: u64) -> Ino {
    let me = Caller::default();
    let mut dir = ROOT;
    let mut last = ROOT;
    for n in from..from + count {
        if n % 100 == 0 || dir == ROOT {
            let name = format!("dir-{n}");
            dir = fs
                .make(
                    me,
                    ROOT,
                    name.as_bytes(),
                    NewNode::new(Kind::Directory, 0o755),
                )
                .unwrap()
                .ino;
        }
        let name = format!("file-{n}");
        last = fs
            .make(me, dir, name.as_bytes(), NewNode::new(Kind::File, 0o644))
            .unwrap()
            .ino;
        fs.write(me, last, 0, name.as_bytes(), false).unwrap();
    }
    last
}

fn bench(c: &mut Criterion) {
    for size in [1_000, 100_000, 1_000_000] {
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::open(dir.path(), EngineConfig::default()).unwrap();
        let id = fork(&engine);
        let fs = engine.fs_of(id).unwrap();
        let ino = make(&fs, 0, size);
        drop(fs);
        commit(&engine, id);
        let mut group = c.benchmark_group("volume");
        group.sample_size(10);
        group.bench_function(BenchmarkId::new("fork and abandon", size), |b| {
            b.iter(|| engine.abandon(fork(&engine)).unwrap());
        });
        let mut next = size;
        group.bench_function(BenchmarkId::new("commit 1,000 new files", size), |b| {
            b.iter_batched(
                || {
                    let id = fork(&engine);
                    next += 1_000;
                    make(&engine.fs_of(id).unwrap(), next, 1_000);
                    id
                },
                |id| commit(&engine, id),
                BatchSize::PerIteration,
            );
        });
        let id = fork(&engine);
        let fs = engine.fs_of(id).unwrap();
        group.bench_function(BenchmarkId::new("getattr", size), |b| {
            b.iter(|| fs.getattr(ino).unwrap());
        });
        group.bench_function(BenchmarkId::new("write 4 KiB in place", size), |b| {
            b.iter(|| {
                fs.write(Caller::default(), ino, 0, &[1; 4096], false)
                    .unwrap()
            });
        });
        group.finish();
        drop(fs);
        engine.abandon(id).unwrap();
        engine.shutdown(true).unwrap();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
