//! Why something was not done.

use crate::fork::error::FsError;
use crate::store::StoreError;

/// The kinds of failure, one per exit status of the command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Code {
    Failed,
    Usage,
    NotFound,
    HeadMoved,
    Damaged,
    Policy,
    Busy,
    NoSpace,
}

/// Why something was not done, in one line, and what may help.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    pub code: Code,
    pub message: String,
    pub hint: Option<String>,
}

impl EngineError {
    pub(super) fn new(code: Code, message: impl Into<String>) -> EngineError {
        EngineError {
            code,
            message: message.into(),
            hint: None,
        }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> EngineError {
        self.hint = Some(hint.into());
        self
    }
}

impl From<StoreError> for EngineError {
    fn from(error: StoreError) -> EngineError {
        let message = error.to_string();
        match error {
            StoreError::Missing { .. } | StoreError::Corrupt { .. } => EngineError::new(Code::Damaged, message)
                .hint("`forkvol check` says which versions it hits, `forkvol check --repair` sets them aside"),
            StoreError::Newer { .. } | StoreError::NotAStore { .. } => EngineError::new(Code::Failed, message),
            StoreError::Locked { .. } => EngineError::new(Code::Busy, message),
            StoreError::NoSpace => {
                EngineError::new(Code::NoSpace, message).hint("free some room, or run `forkvol gc`")
            }
            StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                EngineError::new(Code::NoSpace, message)
            }
            StoreError::Io { .. } | StoreError::Database(_) | StoreError::Lost => EngineError::new(Code::Failed, message),
        }
    }
}

impl From<FsError> for EngineError {
    fn from(error: FsError) -> EngineError {
        match error {
            FsError::Store(error) => error.into(),
            FsError::NoSpace => EngineError::new(Code::NoSpace, error.to_string()),
            FsError::Io(e) if e.kind() == std::io::ErrorKind::StorageFull => {
                EngineError::new(Code::NoSpace, "the disk of the store is full")
            }
            FsError::ReadOnly => {
                EngineError::new(Code::Busy, "a commit of the fork is under way or done")
            }
            other => EngineError::new(Code::Failed, other.to_string()),
        }
    }
}

pub(super) type Result<T> = std::result::Result<T, EngineError>;
