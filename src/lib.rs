//! forkvol: volumes that CI jobs fork, change and commit.
//!
//! A **volume** is a name with a line of immutable **versions**; the newest is its head. A **fork** is a private, writable view of
//! a version, mounted through FUSE. What it changes lies in its delta: a table of edits on top of the version's root, a log that
//! can make the table again, and a spool of written bytes. A **commit** turns the delta into a new root, stores what is new,
//! and makes the result the head in one synced batch. Abandoning a fork drops the delta.
//!
//! A version is one root of a persistent ordered map (`tree`) that holds attributes, directory entries, extended attributes,
//! back references and content (`record`); content lies in chunks named by their BLAKE3 (`chunk`); both are kept in RocksDB
//! (`store`). `fork` is the delta, `fs` the POSIX operations on it, `mount` their FUSE adapter, `commit` the promotion, `engine`
//! the verbs, `daemon` and `cli` the two processes, which speak `protocol`.
//!
//! Imports go down this list only.
#![deny(unsafe_code)]

pub mod chunk;
pub mod cli;
pub mod commit;
pub mod daemon;
pub mod engine;
pub mod fork;
pub mod fs;
#[cfg(test)]
mod hostile;
pub mod mount;
pub mod protocol;
pub mod record;
pub mod store;
pub mod sys;
pub mod tree;
pub mod volume;
