// aedes on a port of loopback: node aedes.mjs PORT [DENIED] [LIMIT]
// The client id `cesar` may publish nothing on topics that begin with DENIED, and no payload of more than LIMIT bytes.
// Only in memory: a restart loses everything.
import { createServer } from 'node:net'
import { Aedes } from 'aedes'

const [port, denied, limit] = process.argv.slice(2)
const broker = await Aedes.createBroker()
broker.authorizePublish = (client, packet, callback) => {
  const isDenied = denied && packet.topic.startsWith(denied)
  const isTooLarge = Number(limit) > 0 && packet.payload.length > Number(limit)
  callback(client?.id === 'cesar' && (isDenied || isTooLarge) ? new Error('not authorised') : null)
}
createServer(broker.handle).listen(Number(port), '127.0.0.1')
