use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::*;

mod format;

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

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

impl Nodes {
    fn new() -> (Nodes, NodeId) {
        let nodes = Nodes::default();
        let (id, bytes) = empty();
        nodes
            .0
            .borrow_mut()
            .insert(id, Arc::new(Node::decode(&bytes).unwrap()));
        (nodes, id)
    }

    /// Applies edits; returns the new root and how many nodes were new.
    fn apply(&self, root: NodeId, edits: BTreeMap<Vec<u8>, Edit>) -> (NodeId, usize) {
        let mut made = HashMap::new();
        let root = apply(
            self,
            root,
            edits.into_iter().collect(),
            &mut |id, bytes, node| {
                assert_eq!(Node::decode(&bytes).as_ref(), Ok(&*node));
                assert_eq!(NodeId::of(&bytes), id);
                assert!(made.insert(id, node).is_none(), "made twice");
            },
        )
        .unwrap();
        let count = made.len();
        self.0.borrow_mut().extend(made);
        (root, count)
    }

    fn build(&self, empty: NodeId, map: &Map) -> NodeId {
        self.apply(
            empty,
            map.iter()
                .map(|(k, v)| (k.clone(), Edit::Put(v.clone())))
                .collect(),
        )
        .0
    }

    fn all(&self, root: NodeId) -> Map {
        range(self, root, Bound::Unbounded, Bound::Unbounded)
            .map(Result::unwrap)
            .collect()
    }
}

fn key(n: u64) -> Vec<u8> {
    [&[0][..], &(n / 7).to_be_bytes(), &n.to_be_bytes()].concat()
}

fn value(n: u64) -> Vec<u8> {
    vec![n as u8; (n % 90) as usize]
}

fn big(count: u64) -> Map {
    (0..count).map(|n| (key(n * 3), value(n))).collect()
}

#[test]
fn the_empty_map_is_a_leaf_without_entries() {
    let (nodes, root) = Nodes::new();
    assert_eq!(get(&nodes, root, b"x"), Ok(None));
    assert!(nodes.all(root).is_empty());
    let full = nodes.build(root, &big(3000));
    let gone = big(3000).into_keys().map(|k| (k, Edit::Delete)).collect();
    assert_eq!(nodes.apply(full, gone).0, root);
}

#[test]
fn every_key_is_found_and_no_other() {
    let (nodes, empty) = Nodes::new();
    let map = big(20_000);
    let root = nodes.build(empty, &map);
    assert_eq!(nodes.all(root), map);
    for n in 0..60_000 {
        assert_eq!(
            get(&nodes, root, &key(n)).unwrap(),
            map.get(&key(n)).cloned(),
            "key {n}"
        );
    }
    let part: Map = prefix(&nodes, root, &key(30_000)[..9])
        .map(Result::unwrap)
        .collect();
    let prefix = key(30_000)[..9].to_vec();
    assert_eq!(
        part,
        map.into_iter()
            .filter(|(k, _)| k.starts_with(&prefix))
            .collect()
    );
}

#[test]
fn a_key_behind_a_root_that_ends_where_a_node_is_cut_leaves_the_root_there() {
    let (nodes, empty) = Nodes::new();
    for size in 1..400 {
        let mut map = big(size);
        let root = nodes.build(empty, &map);
        let last = key(size * 3 + 1);
        map.insert(last.clone(), Vec::new());
        let edit = BTreeMap::from([(last, Edit::Put(Vec::new()))]);
        let (root, _) = nodes.apply(root, edit);
        assert_eq!(nodes.all(root), map, "{size} keys");
        assert_eq!(root, nodes.build(empty, &map));
    }
}

#[test]
fn nodes_written_grow_with_the_edit_and_not_with_the_tree() {
    let (nodes, empty) = Nodes::new();
    let root = nodes.build(empty, &big(100_000));
    for n in 0..50 {
        let edit = BTreeMap::from([(key(n * 6000), Edit::Put(vec![1; (n % 90) as usize]))]);
        let (_, made) = nodes.apply(root, edit);
        assert!(made <= 9, "{made} nodes for one touched key");
    }
}

#[test]
fn a_diff_reads_only_what_differs() {
    let (nodes, empty) = Nodes::new();
    let root = nodes.build(empty, &big(50_000));
    let (other, _) = nodes.apply(
        root,
        BTreeMap::from([(key(600), Edit::Put(b"new".to_vec()))]),
    );
    struct Counted<'a>(&'a Nodes, RefCell<usize>);
    impl Source for Counted<'_> {
        type Error = TreeError;
        fn node(&self, id: NodeId) -> Result<Arc<Node>, TreeError> {
            *self.1.borrow_mut() += 1;
            self.0.node(id)
        }
    }
    let counted = Counted(&nodes, RefCell::new(0));
    let found: Vec<_> = diff(&counted, root, other).map(Result::unwrap).collect();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].new.as_deref(), Some(&b"new"[..]));
    assert!(
        *counted.1.borrow() < 20,
        "{} nodes read",
        counted.1.borrow()
    );
}

fn edits() -> impl Strategy<Value = Vec<BTreeMap<Vec<u8>, Edit>>> {
    let edit = (0_u64..6000, 0..12_u8, 0_u64..90).prop_map(|(n, what, len)| match what {
        0..=6 => (key(n), Edit::Put(vec![n as u8; len as usize])),
        7..=10 => (key(n), Edit::Delete),
        _ => (key(n)[..9].to_vec(), Edit::DeletePrefix),
    });
    prop::collection::vec(prop::collection::btree_map(0_u8..255, edit, 0..120), 0..6).prop_map(
        |batches| {
            batches
                .into_iter()
                .map(|batch| batch.into_values().collect())
                .collect()
        },
    )
}

fn change(map: &mut Map, edits: &BTreeMap<Vec<u8>, Edit>) {
    for (prefix, _) in edits
        .iter()
        .filter(|(_, edit)| **edit == Edit::DeletePrefix)
    {
        map.retain(|key, _| !key.starts_with(prefix));
    }
    for (key, edit) in edits {
        match edit {
            Edit::Put(value) => drop(map.insert(key.clone(), value.clone())),
            Edit::Delete => drop(map.remove(key)),
            Edit::DeletePrefix => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn the_same_map_has_the_same_root_however_it_was_made(size in 0_u64..2000, batches in edits()) {
        let (nodes, empty) = Nodes::new();
        let mut map = big(size);
        let mut root = nodes.build(empty, &map);
        for batch in batches {
            let before = (root, map.clone());
            change(&mut map, &batch);
            root = nodes.apply(root, batch).0;
            prop_assert_eq!(&nodes.all(root), &map);
            prop_assert_eq!(root, nodes.build(empty, &map));
            // Applying the differences gives the other tree.
            let forth = diff(&nodes, before.0, root).map(|d| {
                let d = d.unwrap();
                assert_eq!(d.old, before.1.get(&d.key).cloned());
                assert_eq!(d.new, map.get(&d.key).cloned());
                assert_ne!(d.old, d.new);
                (d.key, d.new.map_or(Edit::Delete, Edit::Put))
            }).collect();
            prop_assert_eq!(nodes.apply(before.0, forth).0, root);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn nodes_written_are_bounded_by_the_edits_whatever_the_tree(
        size in prop::sample::select(vec![100_u64, 3_000, 40_000]),
        touched in prop::collection::btree_map(0_u64..120_000, prop::option::of(0_u64..90), 1..20),
    ) {
        let (nodes, empty) = Nodes::new();
        let root = nodes.build(empty, &big(size));
        let count = touched.len();
        let edit = |(n, put): (u64, Option<u64>)| {
            let edit = put.map_or(Edit::Delete, |len| Edit::Put(vec![n as u8; len as usize]));
            (key(n % (size * 3)), edit)
        };
        let (_, made) = nodes.apply(root, touched.into_iter().map(edit).collect());
        prop_assert!(made <= 9 * count, "{} nodes for {} keys of {}", made, count, size);
    }
}
