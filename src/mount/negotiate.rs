//! What a session asks of the kernel at its beginning.

use fuser::{InitFlags, KernelConfig};

/// The largest READ and WRITE.
const MAX_IO: u32 = 1 << 20;

/// Asks for what makes requests fewer, and larger. With ACLs the kernel checks them and leaves the umask to us. Of a read-only fork
/// each listing tells of the files, so that a reader looks none of them up.
pub fn negotiate(config: &mut KernelConfig, acl: bool, read_only: bool) {
    let mut wanted = vec![
        InitFlags::FUSE_PARALLEL_DIROPS,
        InitFlags::FUSE_ASYNC_DIO,
        InitFlags::FUSE_DO_READDIRPLUS,
        InitFlags::FUSE_NO_OPEN_SUPPORT,
        InitFlags::FUSE_NO_OPENDIR_SUPPORT,
        InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        InitFlags::FUSE_CACHE_SYMLINKS,
    ];
    if !read_only {
        wanted.push(InitFlags::FUSE_READDIRPLUS_AUTO);
    }
    if acl {
        wanted.extend([InitFlags::FUSE_POSIX_ACL, InitFlags::FUSE_DONT_MASK]);
    }
    for flag in wanted {
        // An older kernel has fewer; each one is asked for by itself, and done without where it is not there.
        if config.add_capabilities(flag).is_err() {
            log::debug!("the kernel does not offer {flag:?}");
        }
    }
    for result in [
        config.set_max_write(MAX_IO),
        config.set_max_readahead(MAX_IO),
    ] {
        if let Err(nearest) = result {
            log::debug!("the kernel allows {nearest} bytes at a time");
        }
    }
}
