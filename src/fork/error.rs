//! The answers that a fork may give instead of what was asked.

use std::io;

use crate::store::StoreError;

/// Why an operation on a fork failed. Each has one errno, chosen in `mount`.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    #[error("no such file or directory")]
    NotFound,
    #[error("file exists")]
    Exists,
    #[error("not a directory")]
    NotDirectory,
    #[error("is a directory")]
    IsDirectory,
    #[error("directory not empty")]
    NotEmpty,
    #[error("operation not permitted")]
    NotPermitted,
    #[error("name too long")]
    NameTooLong,
    #[error("no space left in the fork or on the disk of the store")]
    NoSpace,
    #[error("the fork is read-only, or sealed by its commit")]
    ReadOnly,
    #[error("too many links")]
    TooManyLinks,
    #[error("file too large")]
    TooLarge,
    #[error("invalid argument")]
    Invalid,
    #[error("operation not supported")]
    NotSupported,
    #[error("no such extended attribute")]
    NoAttribute,
    #[error("the buffer is too small")]
    Range,
    #[error("the extended attribute is too large")]
    AttributeTooLarge,
    #[error("no data or hole behind that offset")]
    NoSuchOffset,
    #[error("the inode is gone")]
    Stale,
    #[error("the fork has ended")]
    Ended,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Io(#[from] io::Error),
}
