//! The errno of every answer.

use fuser::Errno;

use crate::fork::error::FsError;
use crate::store::StoreError;

/// Returns the errno of an error; a new kind of error does not compile until it has one.
pub fn errno(error: &FsError) -> Errno {
    match error {
        FsError::NotFound => Errno::ENOENT,
        FsError::Exists => Errno::EEXIST,
        FsError::NotDirectory => Errno::ENOTDIR,
        FsError::IsDirectory => Errno::EISDIR,
        FsError::NotEmpty => Errno::ENOTEMPTY,
        FsError::NotPermitted => Errno::EPERM,
        FsError::NameTooLong => Errno::ENAMETOOLONG,
        FsError::NoSpace => Errno::ENOSPC,
        FsError::ReadOnly => Errno::EROFS,
        FsError::TooManyLinks => Errno::EMLINK,
        FsError::TooLarge => Errno::EFBIG,
        FsError::Invalid => Errno::EINVAL,
        FsError::NotSupported => Errno::EOPNOTSUPP,
        FsError::NoAttribute => Errno::ENODATA,
        FsError::Range => Errno::ERANGE,
        FsError::AttributeTooLarge => Errno::E2BIG,
        FsError::NoSuchOffset => Errno::ENXIO,
        FsError::Stale => Errno::ESTALE,
        FsError::Ended => Errno::EIO,
        FsError::Store(StoreError::NoSpace { .. }) => Errno::ENOSPC,
        FsError::Store(_) => Errno::EIO,
        FsError::Io(error) => match error.kind() {
            std::io::ErrorKind::StorageFull => Errno::ENOSPC,
            std::io::ErrorKind::QuotaExceeded => Errno::ENOSPC,
            std::io::ErrorKind::FileTooLarge => Errno::EFBIG,
            _ => Errno::EIO,
        },
    }
}

/// Logs what is the store's or the disk's fault, where it is answered; what a caller asked for is its own business.
pub fn report(what: &str, error: &FsError) {
    match error {
        FsError::Store(StoreError::NoSpace { .. }) => {}
        FsError::Store(_) | FsError::Io(_) => log::error!("{what}: {error}"),
        _ => log::debug!("{what}: {error}"),
    }
}
