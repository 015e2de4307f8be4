//! Unix sockets: credentials of the peer, descriptors beside bytes, and paths longer than the kernel takes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::check;

/// The longest path that fits a socket's address, without its NUL.
pub const MAX_PATH: usize = 107;
/// How many descriptors one message may bring before the kernel drops the rest and says so.
const MAX_FDS: usize = 4;

/// Who is at the other end of a socket, as the kernel saw it when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    pub gid: u32,
    pub pid: i32,
}

/// Returns the credentials of the process that connected or listens at the other end.
pub fn peer(socket: &UnixStream) -> io::Result<Peer> {
    let mut out = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `out` and `length` are writable and `length` is the size of `out`.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut out).cast(),
            &raw mut length,
        )
    })?;
    Ok(Peer {
        uid: out.uid,
        gid: out.gid,
        pid: out.pid,
    })
}

/// Returns a descriptor of the process at the other end, which stands for it even when its number is given to another; `None` where
/// the kernel has no such thing.
///
/// # Errors
/// What the kernel answered, as of a process that has ended.
pub fn peer_process(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut fd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `fd` and `length` are writable and `length` is the size of `fd`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut length,
        )
    };
    match check(result) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(_) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Runs `f` on a name for `path` that is short enough for a socket's address, by way of the folder's descriptor.
fn with_short<T>(path: &Path, f: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    if path.as_os_str().len() <= MAX_PATH {
        return f(path);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let folder = File::open(parent)?;
    f(&PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name))
}

/// Connects to the socket at `path`, however long the path.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    with_short(path, |short| UnixStream::connect(short))
}

/// Binds a listening socket at `path`, however long the path.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    with_short(path, |short| UnixListener::bind(short))
}

/// A control message buffer, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Sends bytes with one descriptor beside them; returns how many bytes went out. The descriptor goes with the first of them.
pub fn send_with_fd(
    socket: &UnixStream,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let mut control = Control([0; 64]);
    // SAFETY: all-zero bytes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if let Some(fd) = fd {
        let size = size_of::<libc::c_int>() as u32;
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE only computes; one descriptor takes 24 of the 64 bytes.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(size) } as _;
        // SAFETY: msg_control points at a zeroed, aligned buffer of msg_controllen bytes, so there is a first header and
        // room behind it for one descriptor.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size) as _;
            libc::CMSG_DATA(header)
                .cast::<libc::c_int>()
                .write_unaligned(fd.as_raw_fd());
        }
    }
    loop {
        // SAFETY: the message points at buffers that outlive the call.
        let n =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        match usize::try_from(n) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Receives bytes, and adds the descriptors that came with them to `fds`. More than a handful is an error; all are closed then.
/// None come where this process may open no more files: the bytes do, for whoever sent them wants an answer.
pub fn receive_with_fds(
    socket: &UnixStream,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let mut control = Control([0; 64]);
    // SAFETY: all-zero bytes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    let size = (MAX_FDS * size_of::<libc::c_int>()) as u32;
    // SAFETY: CMSG_SPACE only computes; four descriptors take 32 of the 64 bytes.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(size) } as _;
    let received = loop {
        // SAFETY: the message points at buffers that are writable and outlive the call.
        let n =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        match usize::try_from(n) {
            Ok(n) => break n,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    };
    let before = fds.len();
    // SAFETY: the kernel filled msg_control up to msg_controllen with whole headers; each SCM_RIGHTS header is followed by
    // descriptors that are open and belong to nobody else yet.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(header).cast::<libc::c_int>();
                let bytes = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                for i in 0..bytes / size_of::<libc::c_int>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 && fds.len() > before {
        fds.clear();
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "too many descriptors in one message",
        ));
    }
    Ok(received)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_travels_with_its_bytes() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        assert_eq!(send_with_fd(&a, b"take", Some(writer.as_fd())).unwrap(), 4);
        drop(writer);
        let (mut buffer, mut fds) = ([0; 16], Vec::new());
        assert_eq!(receive_with_fds(&b, &mut buffer, &mut fds).unwrap(), 4);
        assert_eq!(fds.len(), 1);
        File::from(fds.remove(0)).write_all(b"through").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn bytes_travel_alone_and_the_peer_is_known() {
        let (a, b) = UnixStream::pair().unwrap();
        send_with_fd(&a, b"x", None).unwrap();
        let (mut buffer, mut fds) = ([0; 16], Vec::new());
        assert_eq!(receive_with_fds(&b, &mut buffer, &mut fds).unwrap(), 1);
        assert!(fds.is_empty());
        assert_eq!(peer(&a).unwrap().pid, std::process::id() as i32);
        drop(a);
        assert_eq!(receive_with_fds(&b, &mut buffer, &mut fds).unwrap(), 0);
    }

    #[test]
    fn a_socket_may_lie_under_a_long_path() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("forkvol.sock");
        let listener = bind(&path).unwrap();
        let mut client = connect(&path).unwrap();
        client.write_all(b"hi").unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let mut two = [0; 2];
        server.read_exact(&mut two).unwrap();
        assert_eq!(&two, b"hi");
        assert!(path.exists());
    }
}
