//! A place in one level of a tree.

use std::sync::Arc;

use super::{Node, NodeId, Source, check_child};

/// Walks the nodes of one level from left to right.
pub struct Cursor<'a, S: Source> {
    source: &'a S,
    root: NodeId,
    level: u8,
    /// The inner nodes above the current one, and which child of each it lies under.
    path: Vec<(Arc<Node>, usize)>,
}

/// A node and its name.
pub type Named = (NodeId, Arc<Node>);

impl<'a, S: Source> Cursor<'a, S> {
    pub fn new(source: &'a S, root: NodeId, level: u8) -> Cursor<'a, S> {
        Cursor {
            source,
            root,
            level,
            path: Vec::new(),
        }
    }

    /// Returns the first node of the level with a key that is at least `key`, or its last node.
    pub fn seek(&mut self, key: &[u8]) -> Result<Named, S::Error> {
        self.path.clear();
        let mut at = (self.root, self.source.node(self.root)?);
        while at.1.level() > self.level {
            let child = at.1.find(key).min(at.1.len() - 1);
            at = self.descend(at.1, child)?;
        }
        Ok(at)
    }

    /// Whether the current node is the last one of its level.
    pub fn is_last(&self) -> bool {
        self.path.iter().all(|(node, at)| at + 1 == node.len())
    }

    /// Returns the next node of the level.
    pub fn next(&mut self) -> Result<Option<Named>, S::Error> {
        while let Some((node, at)) = self.path.pop() {
            if at + 1 < node.len() {
                let mut at = self.descend(node, at + 1)?;
                while at.1.level() > self.level {
                    at = self.descend(at.1, 0)?;
                }
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    fn descend(&mut self, node: Arc<Node>, at: usize) -> Result<Named, S::Error> {
        let id = node.child(at)?;
        let child = self.source.node(id)?;
        check_child(&node, at, &child)?;
        self.path.push((node, at));
        Ok((id, child))
    }
}
