//! The tree: a persistent ordered map from byte keys to byte values, cut into nodes that are named by the BLAKE3 of their bytes.
//!
//! Where a node ends depends on the keys and weights in it alone, so the same map always has the same root, whatever the
//! order of the edits that made it. Pure: nodes come from a [`Source`] and go to a sink.

mod apply;
mod cursor;
mod diff;
mod node;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Bound;
use std::sync::Arc;

pub use apply::{Edit, apply};
pub use diff::{Diff, Difference, diff};
pub use node::{Node, TreeError};

use cursor::Cursor;

/// The BLAKE3 of a node's bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub [u8; 32]);

impl NodeId {
    /// Returns the id of these bytes.
    pub fn of(bytes: &[u8]) -> NodeId {
        NodeId(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::chunk::fmt_hex(&self.0, f)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::chunk::fmt_hex(&self.0, f)
    }
}

/// Where nodes are read from.
pub trait Source {
    type Error: From<TreeError>;

    /// Returns a node that is part of a tree.
    fn node(&self, id: NodeId) -> Result<Arc<Node>, Self::Error>;
}

/// Returns the empty map: a leaf without entries, and its id.
pub fn empty() -> (NodeId, Vec<u8>) {
    let bytes = Node::new(0).encode();
    (NodeId::of(&bytes), bytes)
}

/// Returns the value of a key.
pub fn get<S: Source>(source: &S, root: NodeId, key: &[u8]) -> Result<Option<Vec<u8>>, S::Error> {
    let mut node = source.node(root)?;
    loop {
        let at = node.find(key);
        if at == node.len() {
            return Ok(None);
        }
        if node.level() == 0 {
            return Ok((node.key(at) == key).then(|| node.value(at).to_vec()));
        }
        let child = source.node(node.child(at)?)?;
        check_child(&node, at, &child)?;
        node = child;
    }
}

/// Checks that a node is where entry `at` of its parent says: a level lower, and with the keys behind the entry before, up to
/// this one. So whatever stands in the nodes, a way down ends, and keys ascend across nodes too.
pub(crate) fn check_child(parent: &Node, at: usize, child: &Node) -> Result<(), TreeError> {
    if Some(child.level()) != parent.level().checked_sub(1) {
        return Err(TreeError("a node is at the wrong level"));
    }
    let last = child.len().checked_sub(1);
    let ends = last.is_some_and(|last| child.key(last) == parent.key(at));
    let begins = ends
        && at
            .checked_sub(1)
            .is_none_or(|before| child.key(0) > parent.key(before));
    if begins {
        Ok(())
    } else {
        Err(TreeError(
            "a node does not hold the keys that it stands for",
        ))
    }
}

/// Returns the entries between two bounds, in order.
pub fn range<'a, S: Source>(
    source: &'a S,
    root: NodeId,
    from: Bound<&[u8]>,
    to: Bound<&[u8]>,
) -> Range<'a, S> {
    Range {
        cursor: Cursor::new(source, root, 0),
        at: None,
        from: from.map(<[u8]>::to_vec),
        to: to.map(<[u8]>::to_vec),
    }
}

/// Returns the entries whose keys begin with `prefix`, in order.
pub fn prefix<'a, S: Source>(source: &'a S, root: NodeId, prefix: &[u8]) -> Range<'a, S> {
    let end = prefix_end(prefix);
    let to = end.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
    range(source, root, Bound::Included(prefix), to)
}

/// The first key behind all those that begin with `prefix`; `None` if there is none.
fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|byte| *byte != 0xff)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

/// A key and its value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// The entries between two bounds.
pub struct Range<'a, S: Source> {
    cursor: Cursor<'a, S>,
    at: Option<(Arc<Node>, usize)>,
    from: Bound<Vec<u8>>,
    to: Bound<Vec<u8>>,
}

impl<S: Source> Range<'_, S> {
    fn step(&mut self) -> Result<Option<Pair>, S::Error> {
        if self.at.is_none() {
            let (key, skip_equal) = match &self.from {
                Bound::Included(key) => (key.as_slice(), false),
                Bound::Excluded(key) => (key.as_slice(), true),
                Bound::Unbounded => (&[][..], false),
            };
            let (_, leaf) = self.cursor.seek(key)?;
            let mut at = leaf.find(key);
            if skip_equal && at < leaf.len() && leaf.key(at) == key {
                at += 1;
            }
            self.at = Some((leaf, at));
        }
        loop {
            let Some((leaf, at)) = &mut self.at else {
                return Ok(None);
            };
            if *at < leaf.len() {
                let key = leaf.key(*at);
                let inside = match &self.to {
                    Bound::Included(to) => key <= to.as_slice(),
                    Bound::Excluded(to) => key < to.as_slice(),
                    Bound::Unbounded => true,
                };
                if !inside {
                    return Ok(None);
                }
                let entry = (key.to_vec(), leaf.value(*at).to_vec());
                *at += 1;
                return Ok(Some(entry));
            }
            // A range that ends within this leaf never asks for the next one.
            let beyond = match (&self.to, leaf.len().checked_sub(1)) {
                (Bound::Included(to) | Bound::Excluded(to), Some(last)) => {
                    leaf.key(last) >= to.as_slice()
                }
                _ => false,
            };
            match if beyond { None } else { self.cursor.next()? } {
                Some((_, next)) => self.at = Some((next, 0)),
                None => return Ok(None),
            }
        }
    }
}

impl<S: Source> Iterator for Range<'_, S> {
    type Item = Result<Pair, S::Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

/// Visits the nodes of a tree from the root down; `enter` says whether to go below a node, which it sees but once a call.
pub fn walk<S: Source>(
    source: &S,
    root: NodeId,
    enter: &mut dyn FnMut(NodeId) -> bool,
    visit: &mut dyn FnMut(&Node) -> Result<(), S::Error>,
) -> Result<(), S::Error> {
    walk_below(source, None, root, enter, visit)
}

fn walk_below<S: Source>(
    source: &S,
    parent: Option<(&Node, usize)>,
    id: NodeId,
    enter: &mut dyn FnMut(NodeId) -> bool,
    visit: &mut dyn FnMut(&Node) -> Result<(), S::Error>,
) -> Result<(), S::Error> {
    if !enter(id) {
        return Ok(());
    }
    let node = source.node(id)?;
    if let Some((parent, at)) = parent {
        check_child(parent, at, &node)?;
    }
    visit(&node)?;
    if node.level() > 0 {
        for at in 0..node.len() {
            walk_below(source, Some((&node, at)), node.child(at)?, enter, visit)?;
        }
    }
    Ok(())
}
