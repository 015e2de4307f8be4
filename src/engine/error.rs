//! Why something was not done.

use crate::fork::error::FsError;
use crate::store::StoreError;

const EMFILE: i32 = 24;
const ENFILE: i32 = 23;

/// What helps a daemon that may open no more files.
pub const MORE_FILES: &str = "abandon or commit some forks, or raise the daemon's limit (LimitNOFILE= of its service, `ulimit -n`)";

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
    /// What was ingested for it is gone, and what it is made of is not: it may be tried again at once.
    pub(super) lost: bool,
}

impl EngineError {
    pub(super) fn new(code: Code, message: impl Into<String>) -> EngineError {
        EngineError {
            code,
            message: message.into(),
            hint: None,
            lost: false,
        }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> EngineError {
        self.hint = Some(hint.into());
        self
    }
}

/// What helps where a folder cannot be the store.
const ANOTHER: &str = "choose a folder that you may write to with --store or FORKVOL_STORE";

impl From<StoreError> for EngineError {
    fn from(error: StoreError) -> EngineError {
        let message = error.to_string();
        match error {
            StoreError::Missing { .. } | StoreError::Corrupt { .. } => EngineError::new(Code::Damaged, message)
                .hint("`forkvol check` says which versions it hits, `forkvol check --repair` sets them aside"),
            StoreError::Unreadable { .. } => EngineError::new(Code::Damaged, message)
                .hint("put back what is missing, or move the folder away to begin an empty store"),
            StoreError::Newer { .. } => EngineError::new(Code::Failed, message),
            StoreError::NotAStore { .. } => EngineError::new(Code::Failed, message).hint(ANOTHER),
            StoreError::Locked { .. } => EngineError::new(Code::Busy, message)
                .hint("end that process, or name another store with --store"),
            // The database writes again when it can be opened again. Nothing can be deleted from it before.
            StoreError::NoSpace { wants } => {
                let wants = wants.div_ceil(1 << 20);
                EngineError::new(Code::NoSpace, message)
                    .hint(format!("make at least {wants} MiB of room there: abandon forks, or remove other files"))
            }
            StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                EngineError::new(Code::NoSpace, message).hint("make room there")
            }
            StoreError::Io { source, .. } if matches!(
                source.kind(),
                std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
            ) => EngineError::new(Code::Failed, message).hint(ANOTHER),
            StoreError::Lost => EngineError { lost: true, ..EngineError::new(Code::Failed, message) },
            StoreError::Moved => EngineError::new(Code::HeadMoved, message),
            StoreError::Ending => EngineError::new(Code::Busy, message),
            StoreError::Io { .. } | StoreError::Database(_) => EngineError::new(Code::Failed, message),
        }
    }
}

impl From<FsError> for EngineError {
    fn from(error: FsError) -> EngineError {
        match error {
            FsError::Store(error) => error.into(),
            FsError::NoSpace => EngineError::new(Code::NoSpace, error.to_string())
                .hint("make room on the disk, or fork with a larger --size"),
            FsError::Io(e) if e.kind() == std::io::ErrorKind::StorageFull => {
                EngineError::new(Code::NoSpace, "the disk of the store is full")
                    .hint("make room there")
            }
            FsError::Io(e) if matches!(e.raw_os_error(), Some(EMFILE | ENFILE)) => {
                EngineError::new(Code::Failed, "the daemon has too many open files")
                    .hint(MORE_FILES)
            }
            FsError::ReadOnly => {
                EngineError::new(Code::Busy, "a commit of the fork is under way or done")
            }
            other => EngineError::new(Code::Failed, other.to_string()),
        }
    }
}

pub(super) type Result<T> = std::result::Result<T, EngineError>;
