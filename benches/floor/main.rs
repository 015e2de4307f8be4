//! The floor that `scripts/bench` measures forkvol against: a FUSE filesystem in memory that does nothing but answer.
//!
//! It asks of the kernel what forkvol asks (no open, everything cached for ever, no write-back cache, KILLPRIV_V2) and
//! refuses no xattr with ENOSYS, as no filesystem that has them may. What a phase takes here is the price of its requests.
//!
//!     floor [--awake] MOUNTPOINT
//!
//! Prints `mounted` and serves until it is unmounted. Then each line on its standard input mounts the same tree again,
//! and the end of input ends it. `--awake` keeps idle cores polling meanwhile, as forkvol's daemon does under load.

mod tree;

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, ReplyXattr, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};

use forkvol::mount::{FOREVER, negotiate, nothing};
use tree::{Body, Node, Tree, blocks, folder, told};

/// One session on the tree.
struct Floor(Arc<Tree>);

impl Floor {
    /// Makes an inode and enters it.
    fn make(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        (kind, mode): (FileType, u32),
        rdev: u32,
        body: Body,
    ) -> Result<FileAttr, Errno> {
        if self.0.find(parent.0, name)?.is_some() {
            return Err(Errno::EEXIST);
        }
        let perm = (mode & 0o7777) as u16;
        let owner = (request.uid(), request.gid());
        let cell = self.0.add(kind, perm, owner, rdev, body);
        let attr = told(&cell);
        self.0.enter(parent.0, name, attr.ino.0, kind)?;
        Ok(attr)
    }

    fn remove(&self, parent: INodeNo, name: &OsStr) -> Result<(), Errno> {
        let ino = self.0.find(parent.0, name)?.ok_or(Errno::ENOENT)?;
        if self.0.is_full(ino)? {
            return Err(Errno::ENOTEMPTY);
        }
        self.0.leave(parent.0, name)?;
        self.0.unlink(ino)
    }
}

fn entry(reply: ReplyEntry, result: Result<FileAttr, Errno>) {
    match result {
        Ok(attr) => reply.entry(&FOREVER, &attr, Generation(0)),
        Err(error) => reply.error(error),
    }
}

fn empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

impl Filesystem for Floor {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        negotiate(config, false, false);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.0.find(parent.0, name);
        let result = found.and_then(|ino| match ino {
            Some(ino) => Ok(told(&self.0.get(ino)?)),
            None => Ok(nothing()),
        });
        entry(reply, result);
    }

    fn forget(&self, _: &Request, ino: INodeNo, times: u64) {
        self.0.forget(ino.0, times);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.get(ino.0) {
            Ok(cell) => {
                let attr = cell.lock().attr;
                reply.attr(&FOREVER, &attr);
            }
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let cell = match self.0.get(ino.0) {
            Ok(cell) => cell,
            Err(error) => return reply.error(error),
        };
        let now = SystemTime::now();
        let time = |time: TimeOrNow| match time {
            TimeOrNow::SpecificTime(time) => time,
            TimeOrNow::Now => now,
        };
        let mut node = cell.lock();
        let Node { attr, body, .. } = &mut *node;
        attr.perm = mode.map_or(attr.perm, |mode| (mode & 0o7777) as u16);
        attr.uid = uid.unwrap_or(attr.uid);
        attr.gid = gid.unwrap_or(attr.gid);
        if let (Some(size), Body::File(content)) = (size, body) {
            content.resize(size as usize, 0);
            attr.size = size;
            attr.blocks = blocks(size);
            attr.mtime = now;
        }
        attr.atime = atime.map_or(attr.atime, time);
        attr.mtime = mtime.map_or(attr.mtime, time);
        attr.ctime = now;
        reply.attr(&FOREVER, attr);
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.0.get(ino.0) {
            Ok(cell) => match &cell.lock().body {
                Body::Symlink(target) => reply.data(target),
                _ => reply.error(Errno::EINVAL),
            },
            Err(error) => reply.error(error),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let (kind, body) = match mode & 0o170_000 {
            0 | 0o100_000 => (FileType::RegularFile, Body::File(Vec::new())),
            0o010_000 => (FileType::NamedPipe, Body::Special),
            0o020_000 => (FileType::CharDevice, Body::Special),
            0o060_000 => (FileType::BlockDevice, Body::Special),
            0o140_000 => (FileType::Socket, Body::Special),
            _ => return reply.error(Errno::EINVAL),
        };
        let made = self.make(request, parent, name, (kind, mode), rdev, body);
        entry(reply, made);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        let kind = (FileType::Directory, mode);
        let made = self.make(request, parent, name, kind, 0, folder(parent.0));
        entry(reply, made);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.remove(parent, name));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.remove(parent, name));
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let body = Body::Symlink(target.as_os_str().as_bytes().to_vec());
        let kind = (FileType::Symlink, 0o777);
        entry(reply, self.make(request, parent, name, kind, 0, body));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        to: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if flags.bits() != 0 {
            return reply.error(Errno::EINVAL);
        }
        let rename = || {
            let ino = self.0.find(parent.0, name)?.ok_or(Errno::ENOENT)?;
            match self.0.find(to.0, new_name)? {
                Some(same) if same == ino => return Ok(()),
                Some(_) => self.remove(to, new_name)?,
                None => {}
            }
            self.0.leave(parent.0, name)?;
            let cell = self.0.get(ino)?;
            let mut node = cell.lock();
            if let Body::Folder { parent, .. } = &mut node.body {
                *parent = to.0;
            }
            let kind = node.attr.kind;
            drop(node);
            self.0.enter(to.0, new_name, ino, kind)
        };
        empty(reply, rename());
    }

    fn link(&self, _: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let link = || {
            if self.0.find(parent.0, name)?.is_some() {
                return Err(Errno::EEXIST);
            }
            let cell = self.0.get(ino.0)?;
            cell.lock().attr.nlink += 1;
            let attr = told(&cell);
            self.0.enter(parent.0, name, ino.0, attr.kind)?;
            Ok(attr)
        };
        entry(reply, link());
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.0.get(ino.0) {
            Ok(cell) => match &cell.lock().body {
                Body::File(content) => {
                    let from = (offset as usize).min(content.len());
                    let to = (from + size as usize).min(content.len());
                    reply.data(&content[from..to]);
                }
                _ => reply.error(Errno::EINVAL),
            },
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let cell = match self.0.get(ino.0) {
            Ok(cell) => cell,
            Err(error) => return reply.error(error),
        };
        let mut node = cell.lock();
        let Node { attr, body, .. } = &mut *node;
        let Body::File(content) = body else {
            return reply.error(Errno::EINVAL);
        };
        let from = offset as usize;
        let to = from + data.len();
        if content.len() < to {
            content.resize(to, 0);
        }
        content[from..to].copy_from_slice(data);
        attr.size = content.len() as u64;
        attr.blocks = blocks(attr.size);
        attr.mtime = SystemTime::now();
        attr.ctime = attr.mtime;
        reply.written(data.len() as u32);
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listed = self.0.list(ino.0, offset, |cookie, name, ino, kind| {
            !reply.add(INodeNo(ino), cookie, kind, name)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn readdirplus(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let mut entries = Vec::new();
        let listed = self.0.list(ino.0, offset, |cookie, name, ino, _| {
            entries.push((cookie, name.to_owned(), ino));
            entries.len() < 512
        });
        if let Err(error) = listed {
            return reply.error(error);
        }
        for (cookie, name, ino) in entries {
            let Ok(cell) = self.0.get(ino) else { continue };
            let attr = cell.lock().attr;
            if reply.add(INodeNo(ino), cookie, &name, &FOREVER, &attr, Generation(0)) {
                break;
            }
            // The kernel counts no lookup for "." and "..".
            if cookie > 2 {
                cell.lock().lookups += 1;
            }
        }
        reply.ok();
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENODATA);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, size: u32, reply: ReplyXattr) {
        if size == 0 {
            reply.size(0);
        } else {
            reply.data(&[]);
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let kind = (FileType::RegularFile, mode);
        match self.make(request, parent, name, kind, 0, Body::File(Vec::new())) {
            Ok(attr) => {
                let keep = FopenFlags::FOPEN_KEEP_CACHE;
                reply.created(&FOREVER, &attr, Generation(0), FileHandle(0), keep);
            }
            Err(error) => reply.error(error),
        }
    }
}

fn serve(tree: &Arc<Tree>, at: &Path) -> io::Result<()> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("floor".into()),
        MountOption::DefaultPermissions,
    ];
    config.acl = SessionACL::All;
    config.n_threads = Some(2);
    let session = Session::new(Floor(tree.clone()), at, &config)?;
    println!("mounted");
    io::stdout().flush()?;
    // However it ended, the mount is gone: what follows is the next line's to say.
    if let Err(error) = session.run() {
        eprintln!("floor: the session ended: {error}");
    }
    tree.forget_all();
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let is_awake = arguments.first().is_some_and(|first| first == "--awake");
    if is_awake {
        arguments.remove(0);
    }
    let [at] =
        <[OsString; 1]>::try_from(arguments).map_err(|_| "usage: floor [--awake] MOUNTPOINT")?;
    let at = PathBuf::from(at);
    // Held open as long as this runs: 0 microseconds of wake-up latency means that idle cores poll.
    let mut awake = is_awake
        .then(|| File::options().write(true).open("/dev/cpu_dma_latency"))
        .transpose()?;
    if let Some(file) = &mut awake {
        file.write_all(&0i32.to_ne_bytes())?;
    }
    let tree = Arc::new(Tree::new());
    serve(&tree, &at)?;
    for line in io::stdin().lines() {
        line?;
        serve(&tree, &at)?;
    }
    Ok(())
}
