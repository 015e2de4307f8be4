//! Frames over a Unix socket, with a bound on their size and on the time that one may take.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::sys::socket;

/// Why a frame could not be sent or read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("the other side closed the connection")]
    Closed,
    #[error("the other side did not answer in time")]
    TimedOut,
    #[error("a message of {length} bytes is longer than the {limit} allowed")]
    TooLong { length: usize, limit: usize },
    #[error("a message is not what the protocol says: {0}")]
    Garbage(#[from] serde_json::Error),
    #[error("a message came with more descriptors than the {0} allowed")]
    TooManyFds(usize),
    #[error("the connection failed: {0}")]
    Io(io::Error),
}

impl From<io::Error> for FrameError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => FrameError::TimedOut,
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => FrameError::Closed,
            _ => FrameError::Io(error),
        }
    }
}

/// The most descriptors that may come with a frame. Each piece of one may bring some, and each takes a place in a short table.
const FDS_MAX: usize = 4;

/// One end of a connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Descriptors that came with the frame read last.
    fds: Vec<OwnedFd>,
}

impl Connection {
    pub fn new(stream: UnixStream) -> Connection {
        Connection {
            stream,
            fds: Vec::new(),
        }
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Bounds how long one write may wait for the other side to read.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_write_timeout(timeout)
    }

    /// Returns the descriptors that came with the frame read last.
    pub fn take_fds(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }

    /// Sends a message.
    pub fn send(&mut self, message: &impl Serialize) -> Result<(), FrameError> {
        self.send_with_fd(message, None)
    }

    /// Sends a message with a descriptor beside it.
    pub fn send_with_fd(
        &mut self,
        message: &impl Serialize,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), FrameError> {
        let mut frame = vec![0; 4];
        serde_json::to_writer(&mut frame, message)?;
        self.write_frame(frame, fd)
    }

    /// Sends a frame of raw content; one without bytes ends a row of them.
    pub fn send_content(&mut self, bytes: &[u8]) -> Result<(), FrameError> {
        let mut frame = Vec::with_capacity(4 + bytes.len());
        frame.extend_from_slice(&[0; 4]);
        frame.extend_from_slice(bytes);
        self.write_frame(frame, None)
    }

    /// Sends a frame whose first four bytes are still to hold its length.
    fn write_frame(
        &mut self,
        mut frame: Vec<u8>,
        mut fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), FrameError> {
        let length = frame.len() - 4;
        let header = u32::try_from(length).map_err(|_| FrameError::TooLong {
            length,
            limit: u32::MAX as usize,
        })?;
        frame[..4].copy_from_slice(&header.to_be_bytes());
        let mut rest = frame.as_slice();
        while !rest.is_empty() {
            let sent = socket::send_with_fd(&self.stream, rest, fd.take())?;
            rest = rest.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    /// Reads a message of at most `limit` bytes, all of it within `timeout`.
    pub fn receive<T: DeserializeOwned>(
        &mut self,
        limit: usize,
        timeout: Option<Duration>,
    ) -> Result<T, FrameError> {
        Ok(serde_json::from_slice(
            &self.receive_content(limit, timeout)?,
        )?)
    }

    /// Reads a frame as it is.
    pub fn receive_content(
        &mut self,
        limit: usize,
        timeout: Option<Duration>,
    ) -> Result<Vec<u8>, FrameError> {
        self.fds.clear();
        // A time that no clock can show is none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut header = [0; 4];
        self.fill(&mut header, deadline)?;
        let length = u32::from_be_bytes(header) as usize;
        if length > limit {
            return Err(FrameError::TooLong { length, limit });
        }
        // Room is taken as the bytes come, so that a header alone costs nothing.
        let mut frame = Vec::new();
        while frame.len() < length {
            let from = frame.len();
            frame.resize(length.min(from + (1 << 20)), 0);
            self.fill(&mut frame[from..], deadline)?;
        }
        Ok(frame)
    }

    fn fill(&mut self, mut buffer: &mut [u8], deadline: Option<Instant>) -> Result<(), FrameError> {
        while !buffer.is_empty() {
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(FrameError::TimedOut);
            }
            self.stream.set_read_timeout(left)?;
            match socket::receive_with_fds(&self.stream, buffer, &mut self.fds)? {
                0 => return Err(FrameError::Closed),
                _ if self.fds.len() > FDS_MAX => {
                    self.fds.clear();
                    return Err(FrameError::TooManyFds(FDS_MAX));
                }
                n => buffer = buffer.get_mut(n..).unwrap_or_default(),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::hostile;
    use std::io::Write;
    use std::os::fd::AsFd;

    const SOON: Option<Duration> = Some(Duration::from_secs(5));

    fn pair() -> (Connection, Connection) {
        let (a, b) = UnixStream::pair().unwrap();
        (Connection::new(a), Connection::new(b))
    }

    #[test]
    fn messages_content_and_descriptors_arrive() {
        let (mut a, mut b) = pair();
        let (pipe, _writer) = io::pipe().unwrap();
        a.send(&"one").unwrap();
        a.send_with_fd(&2, Some(pipe.as_fd())).unwrap();
        a.send_content(b"\xffthree").unwrap();
        a.send_content(b"").unwrap();
        assert_eq!(b.receive::<String>(100, SOON).unwrap(), "one");
        assert!(b.take_fds().is_empty());
        assert_eq!(b.receive::<i32>(100, SOON).unwrap(), 2);
        assert_eq!(b.take_fds().len(), 1);
        assert_eq!(b.receive_content(100, SOON).unwrap(), b"\xffthree");
        assert_eq!(b.receive_content(100, SOON).unwrap(), b"");
        drop(a);
        assert!(matches!(
            b.receive::<i32>(100, SOON),
            Err(FrameError::Closed)
        ));
    }

    #[test]
    fn a_frame_has_a_bound_in_size_and_time() {
        let (a, mut b) = pair();
        (&a.stream).write_all(&u32::MAX.to_be_bytes()).unwrap();
        let error = b.receive::<i32>(100, SOON).unwrap_err();
        assert!(
            matches!(error, FrameError::TooLong { limit: 100, .. }),
            "{error}"
        );
        let (a, mut b) = pair();
        (&a.stream).write_all(&[0, 0, 0, 9, b'"']).unwrap();
        let error = b
            .receive::<i32>(100, Some(Duration::from_millis(20)))
            .unwrap_err();
        assert!(matches!(error, FrameError::TimedOut), "{error}");
    }

    #[test]
    fn a_frame_in_many_pieces_brings_no_more_descriptors_than_one() {
        let (a, mut b) = pair();
        let (pipe, _writer) = io::pipe().unwrap();
        for piece in [0, 0, 0, 9, b'1', b'2', b'3'] {
            socket::send_with_fd(&a.stream, &[piece], Some(pipe.as_fd())).unwrap();
        }
        let error = b.receive::<i32>(100, SOON).unwrap_err();
        assert!(matches!(error, FrameError::TooManyFds(_)), "{error}");
        assert!(b.take_fds().is_empty());
    }

    #[test]
    fn a_patience_without_end_is_no_deadline() {
        let (mut a, mut b) = pair();
        a.send(&1).unwrap();
        assert_eq!(b.receive::<i32>(100, Some(Duration::MAX)).unwrap(), 1);
    }

    /// Frames as a client may send them.
    fn frames() -> impl Strategy<Value = Vec<u8>> + Clone {
        let content = vec(any::<u8>(), 0..80);
        vec(content, 1..4).prop_map(|contents| {
            let frame =
                |content: Vec<u8>| [&(content.len() as u32).to_be_bytes()[..], &content].concat();
            contents.into_iter().flat_map(frame).collect()
        })
    }

    proptest! {
        #[test]
        fn hostile_frames_are_read_up_to_a_bound_or_refused(bytes in hostile::bytes(frames())) {
            let (a, mut b) = pair();
            (&a.stream).write_all(&bytes).unwrap();
            drop(a);
            let mut read = 0;
            let error = loop {
                match b.receive_content(100, SOON) {
                    Ok(frame) => {
                        prop_assert!(frame.len() <= 100 && frame.capacity() <= 1 << 20);
                        let from = read + 4;
                        read = from + frame.len();
                        prop_assert_eq!(Some(&frame[..]), bytes.get(from..read));
                    }
                    Err(error) => break error,
                }
            };
            prop_assert!(matches!(error, FrameError::Closed | FrameError::TooLong { .. }), "{}", error);
        }
    }

    #[test]
    fn garbage_is_told_from_a_message() {
        let (mut a, mut b) = pair();
        a.send_content(b"GET / HTTP/1.1").unwrap();
        assert!(matches!(
            b.receive::<i32>(100, SOON),
            Err(FrameError::Garbage(_))
        ));
    }
}
