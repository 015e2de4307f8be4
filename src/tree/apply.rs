//! Edits: the new tree, made from the nodes that the edits touch alone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::cursor::Cursor;
use super::{Node, NodeId, Source, prefix_end};

/// A change of one key, or of all keys with a prefix.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Edit {
    Put(Vec<u8>),
    Delete,
    /// Takes away every key of the old map that begins with this one; keys put by the same edits stay.
    DeletePrefix,
}

/// A node ends at the latest when its entries weigh this much.
const HARD_CUT: u64 = 32_768;

/// Where new nodes go: id, bytes, decoded.
pub type Sink<'a> = dyn FnMut(NodeId, Vec<u8>, Arc<Node>) + 'a;

/// Applies edits, sorted by key and each key once, and returns the new root. The sink gets each node that the old tree does
/// not have, once.
///
/// # Errors
/// What the source answered.
pub fn apply<S: Source>(
    source: &S,
    root: NodeId,
    edits: Vec<(Vec<u8>, Edit)>,
    sink: &mut Sink<'_>,
) -> Result<NodeId, S::Error> {
    debug_assert!(edits.is_sorted_by(|a, b| a.0 < b.0));
    let height = source.node(root)?.level();
    // Inner nodes are given to the sink at the end: the root may give way to one below it.
    let mut inner: HashMap<NodeId, (Vec<u8>, Arc<Node>)> = HashMap::new();
    let mut edits = edits;
    for level in 0..=height {
        edits = apply_level(source, root, level, edits, &mut inner, sink)?;
        if edits.is_empty() {
            give(inner, sink);
            return Ok(root);
        }
    }
    // What is left puts all nodes of the old root's level, but for the old root where it stays and others come behind it.
    let old = source.node(root)?;
    if let Some(last) = old.len().checked_sub(1).map(|at| old.key(at))
        && let Err(at) = edits.binary_search_by(|(key, _)| key.as_slice().cmp(last))
    {
        edits.insert(at, (last.to_vec(), Edit::Put(root.0.to_vec())));
    }
    let mut nodes: Vec<(Vec<u8>, NodeId)> = edits
        .into_iter()
        .filter_map(|(key, edit)| match edit {
            Edit::Put(id) => Some((key, NodeId(id.try_into().expect("an id has 32 bytes")))),
            Edit::Delete | Edit::DeletePrefix => None,
        })
        .collect();
    let mut level = height;
    while nodes.len() > 1 {
        level += 1;
        let mut cutter = Cutter::new(level);
        for (key, id) in &nodes {
            cutter.push(key, &id.0, &mut inner, sink);
        }
        cutter.flush(&mut inner, sink);
        nodes = cutter.done;
    }
    let Some((_, mut top)) = nodes.pop() else {
        let node = Node::new(0);
        let bytes = node.encode();
        let id = NodeId::of(&bytes);
        sink(id, bytes, Arc::new(node));
        return Ok(id);
    };
    // A root with a single child gives way to it.
    for _ in 0..level {
        let node = match inner.get(&top) {
            Some((_, node)) => node.clone(),
            None => source.node(top)?,
        };
        if node.len() > 1 {
            break;
        }
        inner.remove(&top);
        top = node.child(0)?;
    }
    give(inner, sink);
    Ok(top)
}

fn give(inner: HashMap<NodeId, (Vec<u8>, Arc<Node>)>, sink: &mut Sink<'_>) {
    for (id, (bytes, node)) in inner {
        sink(id, bytes, node);
    }
}

/// Applies edits to one level and returns the edits of the level above.
fn apply_level<S: Source>(
    source: &S,
    root: NodeId,
    level: u8,
    edits: Vec<(Vec<u8>, Edit)>,
    inner: &mut HashMap<NodeId, (Vec<u8>, Arc<Node>)>,
    sink: &mut Sink<'_>,
) -> Result<Vec<(Vec<u8>, Edit)>, S::Error> {
    let mut cursor = Cursor::new(source, root, level);
    let mut removed: BTreeMap<Vec<u8>, NodeId> = BTreeMap::new();
    let mut cutter = Cutter::new(level);
    let mut edits = edits.into_iter().peekable();
    while let Some((key, _)) = edits.peek() {
        let (mut id, mut old) = cursor.seek(key)?;
        let mut taken = Taken::default();
        loop {
            let last = old.len().checked_sub(1).map(|at| old.key(at));
            if let Some(last) = last {
                removed.insert(last.to_vec(), id);
                cutter.known.insert(id);
            }
            for at in 0..old.len() {
                let key = old.key(at);
                let mut replaced = false;
                while let Some((edited, edit)) =
                    edits.next_if(|(edited, _)| edited.as_slice() <= key)
                {
                    replaced = edited == key;
                    taken.edit(&edited, edit, |value| {
                        cutter.push(&edited, value, inner, sink);
                    });
                }
                if !replaced && !taken.covers(key) {
                    cutter.push(key, old.value(at), inner, sink);
                }
            }
            if cursor.is_last() {
                for (edited, edit) in edits.by_ref() {
                    taken.edit(&edited, edit, |value| {
                        cutter.push(&edited, value, inner, sink);
                    });
                }
                cutter.flush(inner, sink);
                break;
            }
            // An end fell on the end of an old node: the nodes behind it stay, up to the next edit.
            if cutter.node.is_empty() && !last.is_some_and(|last| taken.covers(last)) {
                break;
            }
            let Some(next) = cursor.next()? else { break };
            (id, old) = next;
        }
    }
    let mut above: BTreeMap<Vec<u8>, Edit> = removed
        .keys()
        .map(|key| (key.clone(), Edit::Delete))
        .collect();
    for (key, id) in cutter.done {
        if removed.get(&key) == Some(&id) {
            above.remove(&key);
        } else {
            above.insert(key, Edit::Put(id.0.to_vec()));
        }
    }
    Ok(above.into_iter().collect())
}

/// Which keys of the old map a prefix takes away.
#[derive(Default)]
struct Taken {
    any: bool,
    /// The first key that stays; `None`: no key does.
    until: Option<Vec<u8>>,
}

impl Taken {
    fn edit(&mut self, key: &[u8], edit: Edit, put: impl FnOnce(&[u8])) {
        match edit {
            Edit::Put(value) => put(&value),
            Edit::Delete => {}
            Edit::DeletePrefix => {
                let end = prefix_end(key);
                // A prefix within one at work takes nothing more away.
                if !self.covers(key) {
                    self.until = end;
                }
                self.any = true;
            }
        }
    }

    fn covers(&self, key: &[u8]) -> bool {
        self.any && self.until.as_deref().is_none_or(|until| key < until)
    }
}

/// Cuts a row of entries into nodes.
struct Cutter {
    level: u8,
    node: Node,
    weight: u64,
    done: Vec<(Vec<u8>, NodeId)>,
    /// Nodes of the old tree among those made again.
    known: HashSet<NodeId>,
}

impl Cutter {
    fn new(level: u8) -> Cutter {
        Cutter {
            level,
            node: Node::new(level),
            weight: 0,
            done: Vec::new(),
            known: HashSet::new(),
        }
    }

    fn push(
        &mut self,
        key: &[u8],
        value: &[u8],
        inner: &mut HashMap<NodeId, (Vec<u8>, Arc<Node>)>,
        sink: &mut Sink<'_>,
    ) {
        self.node.push(key, value);
        let weight = (key.len() + value.len() + 4) as u64;
        self.weight += weight;
        if self.level > 0 && self.node.len() < 2 {
            return;
        }
        let hash = blake3::hash(key);
        let at = 4 * usize::from(self.level % 8);
        let draw = &hash.as_bytes()[at..at + 4];
        let draw = u32::from_le_bytes(draw.try_into().expect("four bytes"));
        let cube = self.weight.min(HARD_CUT).pow(3);
        if u64::from(draw) < weight.saturating_mul(cube) >> 18 || self.weight >= HARD_CUT {
            self.flush(inner, sink);
        }
    }

    fn flush(&mut self, inner: &mut HashMap<NodeId, (Vec<u8>, Arc<Node>)>, sink: &mut Sink<'_>) {
        if self.node.is_empty() {
            return;
        }
        let node = std::mem::replace(&mut self.node, Node::new(self.level));
        self.weight = 0;
        let bytes = node.encode();
        let id = NodeId::of(&bytes);
        self.done.push((node.key(node.len() - 1).to_vec(), id));
        if self.known.contains(&id) {
            return;
        }
        if self.level == 0 {
            sink(id, bytes, Arc::new(node));
        } else {
            inner.insert(id, (bytes, Arc::new(node)));
        }
    }
}
