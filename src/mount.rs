//! A fork behind the kernel's FUSE: unpacks a request, calls `fs`, packs the reply. The only user of fuser.

mod errno;
mod negotiate;
mod push;
mod reply;
mod requests;
pub mod session;
mod wakeful;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags,
    Generation, INodeNo, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::fork::log::Request as RequestId;
use crate::fs::{Allocate, CAPABILITY, Caller, Fs, NewNode, RenameMode, Seek, SetAttr, XattrMode};
use crate::record::{Ino, Kind, ROOT};
pub use negotiate::negotiate;
use push::Readers;
pub use push::end as end_pushing;
pub use reply::{FOREVER, nothing};
use reply::{answer_xattr, file_attr, file_type, sent, with_room};
pub use requests::Requests;
pub use wakeful::Wakeful;

/// The flag of an open file that is written at its end.
const O_APPEND: i32 = 0o2000;
/// Entries read for one reply of a listing.
const LISTED: usize = 512;

/// One session's view of a fork.
struct Mount {
    fs: Fs,
    epoch: u64,
    requests: Arc<Requests>,
    wakeful: Arc<Wakeful>,
    /// Where something may be pushed.
    readers: Option<Readers>,
}

impl Mount {
    fn caller(&self, request: &Request, kind: &'static str) -> Caller {
        self.requests.count(kind);
        self.wakeful.count();
        let request_id = RequestId {
            epoch: self.epoch,
            unique: request.unique().0,
        };
        Caller {
            uid: request.uid(),
            gid: request.gid(),
            request: request_id,
        }
    }

    /// The inode that a node id of the kernel stands for: 1 is the folder at the top of the session.
    fn ino(&self, node: INodeNo) -> Ino {
        if node.0 == ROOT.0 {
            self.fs.root()
        } else {
            Ino(node.0)
        }
    }

    /// Answers a request behind which the kernel may change what it holds of a file.
    fn before_change(&self, ino: Ino, answer: impl FnOnce() + Send + 'static) {
        match &self.readers {
            Some(readers) => readers.before_change(ino, answer),
            None => answer(),
        }
    }

    /// Whether another kernel may cache a file too, or it cannot be told.
    fn is_shared(&self, ino: Ino) -> bool {
        let look = || self.fs.is_shared(ino, &self.fs.getattr(ino)?);
        self.fs.shares_links() && look().unwrap_or(true)
    }

    /// The node id of an inode.
    fn node(&self, ino: Ino) -> Ino {
        if ino == self.fs.root() { ROOT } else { ino }
    }
}

impl Filesystem for Mount {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        negotiate(config, self.fs.options.acl, self.fs.options.read_only);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.caller(request, "lookup");
        match self.fs.lookup(self.ino(parent), name.as_bytes()) {
            Ok(Some(entry)) => self.answer_entry("lookup", reply, Ok(entry)),
            Ok(None) => reply.entry(&FOREVER, &nothing(), Generation(0)),
            Err(error) => reply.error(self.fail("lookup", &error)),
        }
    }

    fn forget(&self, request: &Request, ino: INodeNo, times: u64) {
        self.caller(request, "forget");
        self.fs.forget(self.ino(ino), times);
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.caller(request, "getattr");
        match self.fs.getattr(self.ino(ino)) {
            Ok(attr) => reply.attr(
                &self.ttl(self.ino(ino), &attr),
                &file_attr(self.ino(ino), &attr),
            ),
            Err(error) => reply.error(self.fail("getattr", &error)),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let caller = self.caller(request, "setattr");
        let time = |time: TimeOrNow| match time {
            TimeOrNow::SpecificTime(time) => sent(time),
            TimeOrNow::Now => sent(SystemTime::now()),
        };
        let set = SetAttr {
            mode: mode.map(|mode| (mode & 0o7777) as u16),
            uid,
            gid,
            size,
            atime: atime.map(time),
            mtime: mtime.map(time),
            ctime: ctime.map(sent),
        };
        let ino = self.ino(ino);
        let set = self.fs.setattr(caller, ino, set);
        let answer = set.map(|attr| (self.ttl(ino, &attr), file_attr(ino, &attr)));
        let answer = answer.map_err(|error| self.fail("setattr", &error));
        let send = move || match answer {
            Ok((ttl, attr)) => reply.attr(&ttl, &attr),
            Err(error) => reply.error(error),
        };
        match size {
            Some(_) => self.before_change(ino, send),
            None => send(),
        }
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        self.caller(request, "readlink");
        match self.fs.readlink(self.ino(ino)) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(self.fail("readlink", &error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let caller = self.caller(request, "mknod");
        let kind = if mode & 0o170_000 == 0 {
            Some(Kind::File)
        } else {
            Kind::from_mode(mode)
        };
        let Some(kind) = kind.filter(|k| !matches!(k, Kind::Directory | Kind::Symlink)) else {
            reply.error(Errno::EINVAL);
            return;
        };
        let node = NewNode {
            rdev,
            umask: self.umask(umask),
            ..NewNode::new(kind, (mode & 0o7777) as u16)
        };
        self.answer_entry(
            "mknod",
            reply,
            self.fs
                .make(caller, self.ino(parent), name.as_bytes(), node),
        );
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let caller = self.caller(request, "mkdir");
        let umask = self.umask(umask);
        let node = NewNode {
            umask,
            ..NewNode::new(Kind::Directory, (mode & 0o1777) as u16)
        };
        self.answer_entry(
            "mkdir",
            reply,
            self.fs
                .make(caller, self.ino(parent), name.as_bytes(), node),
        );
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let caller = self.caller(request, "unlink");
        self.answer_empty(
            "unlink",
            reply,
            self.fs.unlink(caller, self.ino(parent), name.as_bytes()),
        );
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let caller = self.caller(request, "rmdir");
        self.answer_empty(
            "rmdir",
            reply,
            self.fs.rmdir(caller, self.ino(parent), name.as_bytes()),
        );
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let caller = self.caller(request, "symlink");
        let target = target.as_os_str().as_bytes();
        let node = NewNode {
            target,
            ..NewNode::new(Kind::Symlink, 0o777)
        };
        self.answer_entry(
            "symlink",
            reply,
            self.fs
                .make(caller, self.ino(parent), name.as_bytes(), node),
        );
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        to: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let caller = self.caller(request, "rename");
        let mode = match flags.bits() {
            0 => RenameMode::Replace,
            1 => RenameMode::NoReplace,
            2 => RenameMode::Exchange,
            4 => RenameMode::Whiteout,
            5 => RenameMode::WhiteoutNoReplace,
            _ => {
                reply.error(Errno::EINVAL);
                return;
            }
        };
        let (from, to) = (
            (self.ino(parent), name.as_bytes()),
            (self.ino(to), new_name.as_bytes()),
        );
        self.answer_empty("rename", reply, self.fs.rename(caller, from, to, mode));
    }

    fn link(
        &self,
        request: &Request,
        ino: INodeNo,
        parent: INodeNo,
        name: &OsStr,
        reply: ReplyEntry,
    ) {
        let caller = self.caller(request, "link");
        self.answer_entry(
            "link",
            reply,
            self.fs
                .link(caller, self.ino(ino), self.ino(parent), name.as_bytes()),
        );
    }

    /// Files need no handle: the kernel is told not to ask again, save where it may not cache them all.
    fn open(&self, request: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.caller(request, "open");
        if !self.fs.shares_links() {
            reply.error(Errno::ENOSYS);
            return;
        }
        let flags = match self.is_shared(self.ino(ino)) {
            true => FopenFlags::FOPEN_DIRECT_IO,
            false => FopenFlags::FOPEN_KEEP_CACHE,
        };
        reply.opened(FileHandle(0), flags);
    }

    fn opendir(&self, request: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.caller(request, "opendir");
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.caller(request, "read");
        if let Some(readers) = &self.readers
            && let Err(error) = readers.read(self.ino(ino), offset)
        {
            log::error!("read: {error}");
            reply.error(Errno::EIO);
            return;
        }
        with_room(size as usize, |room| {
            match self.fs.read_into(self.ino(ino), offset, room) {
                Ok(done) => {
                    self.requests.count_read(done);
                    reply.data(&room[..done]);
                }
                Err(error) => reply.error(self.fail("read", &error)),
            }
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        flags: WriteFlags,
        open: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let caller = self.caller(request, "write");
        let kill = flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let ino = self.ino(ino);
        if let Some(readers) = &self.readers {
            readers.written(ino);
        }
        let written = match open.0 & O_APPEND != 0 && self.is_shared(ino) {
            true => self.fs.append(caller, ino, data, kill),
            false => self.fs.write(caller, ino, offset, data, kill),
        };
        match written {
            // Of a page that is written back the kernel takes any answer but an error for all of it.
            Ok(written) if written < data.len() && flags.contains(WriteFlags::FUSE_WRITE_CACHE) => {
                reply.error(Errno::ENOSPC);
            }
            Ok(written) => reply.written(written as u32),
            Err(error) => reply.error(self.fail("write", &error)),
        }
    }

    fn flush(&self, request: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.caller(request, "flush");
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, request: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.caller(request, "fsync");
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(&self, request: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.caller(request, "fsyncdir");
        reply.error(Errno::ENOSYS);
    }

    fn readdir(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.caller(request, "readdir");
        let mut is_all = true;
        let listed = self.fs.readdir(self.ino(ino), offset, |entry| {
            is_all = false;
            let name = OsStr::from_bytes(&entry.name);
            !reply.add(
                INodeNo(entry.ino.0),
                entry.cookie,
                file_type(entry.kind),
                name,
            )
        });
        match (listed, &self.readers) {
            (Ok(()), Some(readers)) if is_all => {
                readers.listed_all(self.ino(ino), || reply.ok());
            }
            (Ok(()), _) => reply.ok(),
            (Err(error), _) => reply.error(self.fail("readdir", &error)),
        }
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.caller(request, "readdirplus");
        let mut entries = Vec::new();
        let listed = self.fs.readdir(self.ino(ino), offset, |entry| {
            entries.push(entry);
            entries.len() < LISTED
        });
        if let Err(error) = listed {
            reply.error(self.fail("readdirplus", &error));
            return;
        }
        if let Some(readers) = &self.readers
            && entries.is_empty()
        {
            readers.listed_all(self.ino(ino), || reply.ok());
            return;
        }
        let mut small = Vec::new();
        for entry in entries {
            let found = match self.fs.listed(entry.ino) {
                Ok(Some(found)) => found,
                Ok(None) => continue,
                Err(error) => {
                    reply.error(self.fail("readdirplus", &error));
                    return;
                }
            };
            let is_dot = &*entry.name == b"." || &*entry.name == b"..";
            let attr = file_attr(self.node(found.ino), &found.attr);
            let name = OsStr::from_bytes(&entry.name);
            // One TTL stands for entry and attributes here, so a privileged inode is asked for again.
            let full = reply.add(
                attr.ino,
                entry.cookie,
                name,
                &self.ttl(found.ino, &found.attr),
                &attr,
                Generation(0),
            );
            if full || is_dot {
                self.fs.forget(found.ino, 1);
            }
            if full {
                break;
            }
            small.extend(push::small(&found));
        }
        if let Some(readers) = &self.readers {
            readers.listed(self.ino(ino), offset == 0, small);
        }
        reply.ok();
    }

    fn statfs(&self, request: &Request, _: INodeNo, reply: ReplyStatfs) {
        self.caller(request, "statfs");
        let s = self.fs.statfs();
        reply.statfs(
            s.blocks,
            s.free,
            s.free,
            s.files,
            s.files_free,
            4096,
            255,
            4096,
        );
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        let caller = self.caller(request, "setxattr");
        let mode = match flags {
            0 => XattrMode::Any,
            1 => XattrMode::Create,
            2 => XattrMode::Replace,
            3 => XattrMode::CreateReplace,
            _ => {
                reply.error(Errno::EINVAL);
                return;
            }
        };
        self.answer_empty(
            "setxattr",
            reply,
            self.fs
                .setxattr(caller, self.ino(ino), name.as_bytes(), value, mode),
        );
    }

    fn getxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        self.caller(request, "getxattr");
        let ino = self.ino(ino);
        let value = self.fs.getxattr(ino, name.as_bytes());
        let value = value.map_err(|error| self.fail("getxattr", &error));
        match name.as_bytes() {
            CAPABILITY => self.before_change(ino, move || answer_xattr(reply, size, value)),
            _ => answer_xattr(reply, size, value),
        }
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let caller = self.caller(request, "listxattr");
        let names = self.fs.listxattr(caller, self.ino(ino));
        let names = names.map_err(|error| self.fail("listxattr", &error));
        answer_xattr(reply, size, names);
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let caller = self.caller(request, "removexattr");
        self.answer_empty(
            "removexattr",
            reply,
            self.fs.removexattr(caller, self.ino(ino), name.as_bytes()),
        );
    }

    /// The kernel checks rights by itself (`default_permissions`).
    fn access(&self, request: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        self.caller(request, "access");
        reply.error(Errno::ENOSYS);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let caller = self.caller(request, "create");
        let node = NewNode {
            umask: self.umask(umask),
            ..NewNode::new(Kind::File, (mode & 0o7777) as u16)
        };
        match self
            .fs
            .make(caller, self.ino(parent), name.as_bytes(), node)
        {
            Ok(entry) => {
                let attr = file_attr(entry.ino, &entry.attr);
                let keep = FopenFlags::FOPEN_KEEP_CACHE;
                reply.created(
                    &self.ttl(entry.ino, &entry.attr),
                    &attr,
                    Generation(0),
                    FileHandle(0),
                    keep,
                );
            }
            Err(error) => reply.error(self.fail("create", &error)),
        }
    }

    fn ioctl(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        self.caller(request, "ioctl");
        reply.error(Errno::ENOTTY);
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let caller = self.caller(request, "fallocate");
        let mode = match mode {
            0 => Allocate::Reserve { keep_size: false },
            1 => Allocate::Reserve { keep_size: true },
            3 => Allocate::Punch,
            16 => Allocate::Zero { keep_size: false },
            17 => Allocate::Zero { keep_size: true },
            _ => {
                reply.error(Errno::EOPNOTSUPP);
                return;
            }
        };
        let ino = self.ino(ino);
        let done = self.fs.fallocate(caller, ino, offset, length, mode);
        let done = done.map_err(|error| self.fail("fallocate", &error));
        self.before_change(ino, move || match done {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        });
    }

    fn lseek(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        self.caller(request, "lseek");
        let what = match whence {
            3 => Seek::Data,
            4 => Seek::Hole,
            _ => {
                reply.error(Errno::EINVAL);
                return;
            }
        };
        let Ok(offset) = u64::try_from(offset) else {
            reply.error(Errno::ENXIO);
            return;
        };
        match self.fs.lseek(self.ino(ino), offset, what) {
            Ok(at) => reply.offset(at as i64),
            Err(error) => reply.error(self.fail("lseek", &error)),
        }
    }

    fn copy_file_range(
        &self,
        request: &Request,
        from: INodeNo,
        _: FileHandle,
        from_offset: u64,
        to: INodeNo,
        _: FileHandle,
        to_offset: u64,
        len: u64,
        flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let caller = self.caller(request, "copy_file_range");
        if !flags.is_empty() {
            reply.error(Errno::EINVAL);
            return;
        }
        // The reply's count has 32 bits.
        let len = len.min(1 << 30);
        let (from, to) = ((self.ino(from), from_offset), (self.ino(to), to_offset));
        let done = self.fs.copy_range(caller, from, to, len);
        let done = done.map_err(|error| self.fail("copy_file_range", &error));
        self.before_change(to.0, move || match done {
            Ok(copied) => reply.written(copied as u32),
            Err(error) => reply.error(error),
        });
    }
}

impl Mount {
    /// The umask that is ours to apply: with ACLs the kernel leaves it to us, else it has done so.
    fn umask(&self, umask: u32) -> u16 {
        if self.fs.options.acl {
            (umask & 0o777) as u16
        } else {
            0
        }
    }
}
