//! The tree and the chunks without IO: cutting, hashing, lookup, apply, diff.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use forkvol::chunk::{self, ChunkId};
use forkvol::record::{Ino, attr_key, entry_key, hash56};
use forkvol::tree::{self, Edit, Node, NodeId, Source, TreeError};

#[derive(Default)]
struct Nodes(RefCell<HashMap<NodeId, Arc<Node>>>);

impl Source for Nodes {
    type Error = TreeError;

    fn node(&self, id: NodeId) -> Result<Arc<Node>, TreeError> {
        self.0
            .borrow()
            .get(&id)
            .cloned()
            .ok_or(TreeError("missing"))
    }
}

impl Nodes {
    fn apply(&self, root: NodeId, edits: Vec<(Vec<u8>, Edit)>) -> NodeId {
        let mut made = Vec::new();
        let root =
            tree::apply(self, root, edits, &mut |id, _, node| made.push((id, node))).unwrap();
        self.0.borrow_mut().extend(made);
        root
    }
}

/// Attributes and entries of so many files, a hundred a directory.
fn files(count: u64) -> Vec<(Vec<u8>, Edit)> {
    let mut edits = Vec::new();
    for n in 2..count + 2 {
        let name = format!("file-{n}.js");
        let dir = Ino(1 + n / 100 * 100);
        edits.push((attr_key(Ino(n)), Edit::Put(vec![n as u8; 34])));
        let key = entry_key(dir, hash56(name.as_bytes()), name.as_bytes());
        edits.push((key, Edit::Put(vec![n as u8; 4])));
    }
    edits.sort_by(|a, b| a.0.cmp(&b.0));
    edits
}

fn bench(c: &mut Criterion) {
    let mut seed = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as u8
    })
    .take(16 << 20)
    .collect();
    let mut group = c.benchmark_group("chunk");
    group
        .sample_size(20)
        .throughput(Throughput::Bytes(noise.len() as u64));
    group.bench_function("cut", |b| {
        b.iter(|| {
            let mut at = 0;
            while at < noise.len() {
                at += chunk::first_cut(&noise[at..], true).unwrap();
            }
        });
    });
    group.bench_function("hash", |b| b.iter(|| ChunkId::of(black_box(&noise))));
    group.bench_function("pack", |b| b.iter(|| chunk::pack(black_box(&noise), 3)));
    group.finish();

    let nodes = Nodes::default();
    let (empty, bytes) = tree::empty();
    nodes
        .0
        .borrow_mut()
        .insert(empty, Arc::new(Node::decode(&bytes).unwrap()));
    let root = nodes.apply(empty, files(76_000));
    let mut group = c.benchmark_group("tree of 76,000 files");
    group.sample_size(20);
    let mut n = 0;
    group.bench_function("lookup", |b| {
        b.iter(|| {
            n = (n + 7919) % 76_000;
            tree::get(&nodes, root, &attr_key(Ino(n + 2))).unwrap()
        });
    });
    group.bench_function("build", |b| {
        b.iter_batched(
            || files(76_000),
            |edits| tree::apply(&nodes, empty, edits, &mut |_, _, _| {}).unwrap(),
            BatchSize::LargeInput,
        );
    });
    let edits: Vec<_> = (0..200)
        .map(|n| (attr_key(Ino(2 + n * 379)), Edit::Put(vec![9; 34])))
        .collect();
    group.bench_function("apply 200 edits", |b| {
        b.iter(|| tree::apply(&nodes, root, edits.clone(), &mut |_, _, _| {}).unwrap());
    });
    let other = nodes.apply(root, edits.clone());
    group.bench_function("diff of 200 edits", |b| {
        b.iter(|| tree::diff(&nodes, root, other).count());
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
