//! Why the store could not do what it was asked.

use std::io;
use std::path::{Path, PathBuf};

use super::open::FORMAT;
use super::write;
use crate::tree::TreeError;

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{what} is missing from the store")]
    Missing { what: String },
    #[error("{what} is damaged")]
    Corrupt { what: String },
    #[error(
        "the store {dir} has format {found}, this program knows up to {FORMAT}: use a newer forkvol"
    )]
    Newer { dir: PathBuf, found: u32 },
    #[error("the store {dir} is in use by another process")]
    Locked { dir: PathBuf },
    #[error("{dir} is not a store: {why}")]
    NotAStore { dir: PathBuf, why: String },
    #[error("the store {dir} is damaged and cannot be opened: {why}")]
    Unreadable { dir: PathBuf, why: String },
    /// The database is opened again, and everything goes on, when so many bytes are free.
    #[error("the disk of the store is full")]
    NoSpace { wants: u64 },
    #[error("content was lost with a write to the store that failed: run the command again")]
    Lost,
    #[error("another commit was faster: run the command again")]
    Moved,
    #[error("the daemon is stopping")]
    Ending,
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("the database of the store: {0}")]
    Database(rocksdb::Error),
}

impl StoreError {
    /// Damage that keeps the store in `dir` from being opened: it is of no use to anybody until that is put back.
    pub fn at_open(self, dir: &Path) -> StoreError {
        match self {
            StoreError::Corrupt { what: why } => StoreError::Unreadable {
                dir: dir.into(),
                why,
            },
            other => other,
        }
    }
}

impl From<TreeError> for StoreError {
    fn from(error: TreeError) -> StoreError {
        StoreError::Corrupt {
            what: format!("the tree ({error})"),
        }
    }
}

impl From<rocksdb::Error> for StoreError {
    fn from(error: rocksdb::Error) -> StoreError {
        let text = error.to_string();
        if text.contains("No space left") || text.contains("NoSpace") {
            StoreError::NoSpace {
                wants: write::LEAST_ROOM,
            }
        // A file that the database knows of and that is not there is as bad as one that is wrong.
        } else if error.kind() == rocksdb::ErrorKind::Corruption || text.contains("No such file") {
            StoreError::Corrupt {
                what: format!("the database ({text})"),
            }
        } else {
            StoreError::Database(error)
        }
    }
}
