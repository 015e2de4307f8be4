//! The differences of two trees, found without looking below nodes that both have.

use std::cmp::Ordering;
use std::sync::Arc;

use super::{Node, NodeId, Source, check_child};

/// A key whose values differ.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    pub key: Vec<u8>,
    pub old: Option<Vec<u8>>,
    pub new: Option<Vec<u8>>,
}

/// Returns the differences of two trees, in order of keys.
pub fn diff<S: Source>(source: &S, old: NodeId, new: NodeId) -> Diff<'_, S> {
    Diff {
        source,
        sides: [Side::new(old), Side::new(new)],
        failed: false,
    }
}

/// The differences of two trees.
pub struct Diff<'a, S: Source> {
    source: &'a S,
    sides: [Side; 2],
    failed: bool,
}

/// A place in a tree: in front of a subtree that was not looked into, or of an entry.
struct Side {
    root: Option<NodeId>,
    path: Vec<(Arc<Node>, usize)>,
}

impl Side {
    fn new(root: NodeId) -> Side {
        Side {
            root: Some(root),
            path: Vec::new(),
        }
    }

    /// The subtree that comes next, if it was not looked into, with its level (the root's is not known yet).
    fn subtree(&self) -> Result<Option<(NodeId, u8)>, super::TreeError> {
        if let Some(root) = self.root {
            return Ok(Some((root, u8::MAX)));
        }
        match self.path.last() {
            Some((node, at)) if node.level() > 0 => Ok(Some((node.child(*at)?, node.level() - 1))),
            _ => Ok(None),
        }
    }

    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.path
            .last()
            .map(|(node, at)| (node.key(*at), node.value(*at)))
    }

    fn enter<S: Source>(&mut self, source: &S, id: NodeId) -> Result<(), S::Error> {
        let node = source.node(id)?;
        if let Some((parent, at)) = self.path.last() {
            check_child(parent, *at, &node)?;
        }
        self.root = None;
        if !node.is_empty() {
            self.path.push((node, 0));
        }
        Ok(())
    }

    fn advance(&mut self) {
        if self.root.take().is_some() {
            return;
        }
        while let Some((node, at)) = self.path.last_mut() {
            *at += 1;
            if *at < node.len() {
                return;
            }
            self.path.pop();
        }
    }
}

impl<S: Source> Diff<'_, S> {
    fn step(&mut self) -> Result<Option<Difference>, S::Error> {
        let [old, new] = &mut self.sides;
        loop {
            match (old.subtree()?, new.subtree()?) {
                (Some((a, _)), Some((b, _))) if a == b => {
                    old.advance();
                    new.advance();
                }
                (Some((a, level)), Some((b, other))) => match level.cmp(&other) {
                    Ordering::Greater => old.enter(self.source, a)?,
                    Ordering::Less => new.enter(self.source, b)?,
                    Ordering::Equal => {
                        old.enter(self.source, a)?;
                        new.enter(self.source, b)?;
                    }
                },
                (Some((a, _)), None) => old.enter(self.source, a)?,
                (None, Some((b, _))) => new.enter(self.source, b)?,
                (None, None) => {
                    let order = match (old.entry(), new.entry()) {
                        (None, None) => return Ok(None),
                        (Some(_), None) => Ordering::Less,
                        (None, Some(_)) => Ordering::Greater,
                        (Some((a, x)), Some((b, y))) if a == b && x == y => {
                            old.advance();
                            new.advance();
                            continue;
                        }
                        (Some((a, _)), Some((b, _))) => a.cmp(b),
                    };
                    let mut found = Difference {
                        key: Vec::new(),
                        old: None,
                        new: None,
                    };
                    if order.is_le()
                        && let Some((key, value)) = old.entry()
                    {
                        found.key = key.to_vec();
                        found.old = Some(value.to_vec());
                        old.advance();
                    }
                    if order.is_ge()
                        && let Some((key, value)) = new.entry()
                    {
                        found.key = key.to_vec();
                        found.new = Some(value.to_vec());
                        new.advance();
                    }
                    return Ok(Some(found));
                }
            }
        }
    }
}

impl<S: Source> Iterator for Diff<'_, S> {
    type Item = Result<Difference, S::Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let item = self.step().transpose();
        self.failed = matches!(item, Some(Err(_)));
        item
    }
}
